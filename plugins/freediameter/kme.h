/* SPDX-License-Identifier: Apache-2.0 */
/* The interfaces between the files of kme.fdx. kme.c describes them. */
#ifndef KME_H
#define KME_H

#include "dict.h"
#include "service.h"

/* conf.c */

#define MAX_LIST	64
#define MAX_ORIGIN	255

struct list {
	const char *of[MAX_LIST];
	int n;
};

enum mode { MODE_REFUSE, MODE_PROCESS, MODE_PASS };

struct conf {
	struct kme_service service;
	struct list services;			/* whose instances these are */
	struct list keys;			/* of all settings that are there, but lists */
	char *text;				/* the file, which the strings point into */
	uint32_t vendor;
	long handlers, origin_rate;
	int authorization_rejected;		/* a refused payload is answered 5003, not 5420 */
	enum mode swx, cx, zh;
	int s13;				/* we are an equipment identity register */
	struct list open;			/* IMSIs with these prefixes pass while the service is away */
	struct list agents, legacy_mmes;	/* HOST, or *.REALM */
	struct list provision_from;		/* PLMNs, "home" or "any" */
	struct list home_realms;
};

extern struct conf conf;

int conf_read(const char *path);
int conf_names(const struct list *l, const char *name);

/* kme.c: counters and the log */

enum counter {
	PREPARED, RESTORED, ESTABLISHED, REPORTED, CHECKED, REFUSED, UNAVAILABLE, PASSED_OPEN, OVERLOADED, LIMITED, SPOOFED,
	MALFORMED, COUNTERS
};

void count(enum counter c);
void say_refused(struct msg *m, const char *imsi, const char *origin, const char *why);
void tell(int end);		/* logs what has been counted; in the calls' thread */

/* tap.c: takes messages from the host, and gives them back */

enum kind { REQUEST_LOCAL, REQUEST_PASSING, ANSWER };

/* What is done with a message next. */
enum verdict {
	ASK,	/* it waits for job.call; then job.step is next */
	GO_ON,	/* a request goes to its handler or next hop, an answer to the requester */
	REPLY,	/* job.msg is the answer to the request that it was */
	DROP,	/* there is no memory: the requester runs into a time-out */
};

/* A message that we hold. */
struct job {
	struct kme_call call;		/* first */
	struct job *next;		/* in a queue */
	enum kind kind;
	struct msg *msg;
	enum verdict (*step)(struct job *j);
	/* the rest is the procedure's: what the request says */
	char imsi[16], origin[MAX_ORIGIN + 1];
	int announced, may_provision, legacy, no_provisioning;
	uint8_t *rands[KME_RANDS];	/* in the message */
	size_t n, at;
};

int tap_start(void);	/* from here on, messages are taken */
void tap_end(void);	/* when it returns, no other thread runs in here or holds a message */

/* s6a.c, and s6a_refuse() of message.c */

int s6a_takes(struct msg *m, int request);
enum verdict s6a_request(struct job *j);
enum verdict s6a_answer(struct job *j);
int s6a_refuse(struct msg **m, const char *result, uint32_t experimental);

#endif
