/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The interfaces between the files of the calls: calls.c has the messages, stream.c the requests by libcurl, and
 * service.c the choice of an instance and the time-outs.
 */
#ifndef KME_STREAM_H
#define KME_STREAM_H

#include <curl/curl.h>

#include "service.h"

#define PREFIX		5		/* of a message (connectrpc.com/docs/protocol): flags, and its length */
#define MAX_REQUEST	60000		/* of a message; the service takes 64 KiB */
#define NO_ANSWER	"no answer of this service"
#define NO_REASON	"no Kme-Reason"

/* Fields of kme.proto. */
enum { CALLS = 1, ANSWERS = 1, CALL_ID = 1, CALL_TIMEOUT = 2, ANSWER_ID = 1, ANSWER_ERROR = 2, ERROR_CODE = 1,
       ERROR_REASON = 2 };
enum { FIRST_METHOD = 3 };	/* of Call and of Answer: the methods follow in the order of enum kme_method */

/* An instance is one keysvc. */
struct instance {
	const char *url;
	CURL *stream;			/* NULL: there is none */
	int paused;			/* it has nothing to send */
	int silent;			/* a call had no answer: it is closed when none is under way */
	uint64_t heard;			/* when anything came last */
	enum { GOES_ON, IN_ORDER, BROKEN, TURNED_AWAY } course;	/* whether it has ended, and how */
	const char *why;		/* libcurl's error, if it has ended by one */
	char refusal[KME_REASON + 1];
	struct kme_call *oldest, *newest;	/* under way here */
	struct kme_call *unsent;	/* the oldest of them that was not sent; newer ones were not either */
	uint8_t out[PREFIX + MAX_REQUEST];	/* the message that is being sent */
	size_t out_at, out_size;
	uint8_t *in;			/* the beginning of a message that is not complete */
	size_t in_size, in_room;
	int away;			/* it gets no calls until it is ready, unless all are away */
	CURL *watch;			/* asks whether it is ready; NULL: not now */
	uint64_t watch_at;		/* when it is asked next */
};

#pragma GCC visibility push(hidden)	/* nothing here is for the host, or for another extension */

extern struct kme_service service;
extern struct instance *instances;	/* service.n */

/* calls.c */

void kme_reply_is(struct kme_reply *r, enum kme_status status, const char *reason);
int kme_write_call(struct kme_call *c, uint64_t ms);	/* its message, with the time that it has. 0: it is too long */

/* stream.c */

int stream_start(void);
void stream_end(void);
int stream_open(struct instance *i);		/* 0: it was started */
void stream_close(struct instance *i);
void stream_watch(struct instance *i);		/* asks an instance that is away whether it is ready */
void stream_unwatch(struct instance *i);
void streams_turn(uint64_t until);		/* waits so long at most, and does what is due */

/* service.c, called by stream.c */

int service_answer(struct instance *from, const uint8_t *data, size_t size);	/* 0: it is no answer */
void service_ready(struct instance *i);		/* /readyz says so */
uint64_t service_due(void);			/* when the next time-out is; 0: at once */

#pragma GCC visibility pop

#endif
