/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The test MME's parts: the socket with its lines (mme.c), what they mean in Diameter (mme_lines.c), and the requests
 * that wait for their answers (mme_sent.c).
 */
#ifndef MME_H
#define MME_H

#include <pthread.h>

#include "tgpp.h"

struct text {
	char *data;
	size_t off, len, room;	/* what is between off and len is still to be used */
};

int text_add(struct text *t, const void *data, size_t size);
int text_print(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Makes a request of a line's words. NULL: done, else why not; "malformed" where the line is none. */
const char *mme_request(char **words, int count, const char *realm, struct msg **msg);

/* The line for an answer, without its end. */
int mme_answer(struct text *t, const char *id, struct msg *answer);

/* A connection of the socket. */
struct conn {
	struct conn *next;
	int fd;			/* -1 when closed; the I/O thread's alone */
	int refs;		/* the list, and each request in flight */
	int open, skipping;
	int broken;		/* to be closed; atomic, any thread may say so */
	struct text in, out;
};

#pragma GCC visibility push(hidden)	/* nothing here is for the daemon */

void conn_break(struct conn *c);
void wake(void);		/* the thread of the connections */

/* With the lock held. */
extern pthread_mutex_t lock;
void conn_put(struct conn *c);	/* a reference is given back */
void conn_say(struct conn *c, const struct text *line);

void say_error(struct conn *c, uint64_t id, const char *why);

/* Sends a request, or says why not. */
void submit(struct conn *c, uint64_t id, struct msg **msg, const char *why);
int peer_open(void);
int queue_room(void);
int expire(void);		/* milliseconds to the next time-out, rounded up; -1 if there is none */
void end_requests(void);

#pragma GCC visibility pop

#endif
