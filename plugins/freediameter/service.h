/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls of kme.v1.KeyService, many at once, in one stream to each instance. See ../../api/kme/v1/kme.proto.
 *
 * Several instances share the calls. A call goes to another instance at once if the first one cannot be reached, is
 * silent for half of the call's time, or says that it may answer later. Only a report of a failed authentication is
 * made once. An instance that cannot be reached, is silent, or has lost its HSM or its store gets no calls until its
 * /readyz says that it is ready, unless all are like that. The Go client has the same rules.
 *
 * To make a call: kme_ask_*(), in any thread; then kme_start(), and, unless the reply is there at once, kme_turn()
 * until it calls done, both in one thread. Every call ends by its time-out.
 */
#ifndef KME_SERVICE_H
#define KME_SERVICE_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#define KME_RAND	16
#define KME_NW_SIG	32
#define KME_ATTEMPT	64	/* the longest attempt id */
#define KME_RANDS	32	/* the most in one call */
#define KME_REASON	32
#define KME_CALL	1024	/* octets, more than the longest call */
#define KME_INSTANCES	16	/* the most that there may be */

/* The first four are Binding-Status, too. */
enum kme_status {
	KME_OK = 0,
	KME_REFUSED = 1,	/* by payload, device or subscription: do not try again */
	KME_NO_ATTEMPT = 2,	/* none is open: a new vector opens one */
	KME_UNAVAILABLE = 3,	/* the service is away, slow or overloaded: try later */
	KME_NOT_BOUND,
	KME_NOT_ALLOWED,	/* this origin may not provision, or this caller may not ask */
	KME_BUSY,		/* not asked: too many calls are under way */
};

enum kme_control { KME_NO_CONTROL, KME_PROVISIONING_ONLY = 1, KME_PREPROCESSED = 2 };	/* as in Binding-Control */
enum kme_method { KME_PREPARE, KME_ESTABLISH, KME_REPORT, KME_RESTORE, KME_BINDING, KME_EQUIPMENT };
enum kme_equipment { KME_WHITELISTED = 1, KME_GREYLISTED, KME_BLACKLISTED };

struct kme_service {
	const char *const *urls;	/* of each instance: https://host:port, or unix:/path */
	int n;
	const char *ca, *cert, *key;	/* PEM files, for https */
	long timeout_ms;
	long calls;			/* at once, at most */
	long breaker;			/* so many failures in a row open the circuit breaker */
};

struct kme_reply {
	enum kme_status status;
	char reason[KME_REASON + 1];	/* why it is not KME_OK */
	enum kme_control control;
	char attempt[KME_ATTEMPT + 1];	/* empty unless PROVISIONING_ONLY */
	uint8_t rands[KME_RANDS][KME_RAND];
	uint8_t nw_sig[KME_NW_SIG];
	int bound;			/* PENDING or ACTIVE */
	enum kme_equipment equipment;
};

struct kme_call {
	void (*done)(struct kme_call *c);
	struct kme_reply reply;
	/* the rest is service.c's */
	enum kme_method method;
	size_t asked;			/* RANDs */
	uint64_t id;			/* while it is under way */
	uint64_t deadline;
	struct instance *at;		/* where it is under way */
	uint64_t sent;			/* since when */
	uint64_t until;			/* when its time there ends; 0: it is over */
	unsigned tried;			/* the instances that were tried, a bit each */
	struct kme_call *older, *newer;	/* of those under way there */
	int again;			/* it was sent before, on a stream that ended without an answer to it */
	int once;			/* it is not to be made twice */
	struct wire_out request;	/* without data: it is invalid */
	size_t asks;			/* where in it the method's own message begins */
	uint8_t octets[KME_CALL];
};

int kme_service_start(const struct kme_service *of);
void kme_wake(void);			/* ends kme_turn(); from any thread */
void kme_wake_end(void);		/* kme_wake() must not be called afterwards */
void kme_turn(int wait_ms);		/* waits so long at most, and does what is due */
void kme_service_end(void);		/* calls under way end as KME_UNAVAILABLE; start none afterwards */

/*
 * They check their arguments: digits for IMSI and IMEI, base64url for an attempt. An invalid call has its reply at
 * once.
 */
void kme_ask_prepare(struct kme_call *c, const char *imsi, const char *origin, uint8_t *const *rands, size_t n,
		     int no_provisioning);
void kme_ask_establish(struct kme_call *c, const char *imsi, const char *origin, const char *imei, const char *attempt,
		       const uint8_t *payload, size_t size);
void kme_ask_report(struct kme_call *c, const char *imsi, const char *origin, int ok, int no_provisioning);
void kme_ask_restore(struct kme_call *c, const char *imsi, const char *origin, const uint8_t *rand);
void kme_ask_binding(struct kme_call *c, const char *imsi);
void kme_ask_equipment(struct kme_call *c, const char *imei, const char *imsi);	/* an empty IMSI: not known */

/* 1: under way. 0: the reply is there. */
int kme_start(struct kme_call *c);

/* Milliseconds of a monotonic clock. */
uint64_t kme_now(void);

/* Parse a method's response, and a reason. Also for fuzzing. */
void kme_parse(enum kme_method method, const void *response, size_t size, size_t asked, struct kme_reply *out);
void kme_parse_error(const char *reason, size_t size, struct kme_reply *out);

#endif
