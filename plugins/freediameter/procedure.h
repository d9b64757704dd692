/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The interfaces between the files of the procedure: s6a.c and s13.c have the steps, request.c reads requests, and
 * message.c reads and makes messages.
 */
#ifndef KME_PROCEDURE_H
#define KME_PROCEDURE_H

#include "kme.h"

/* A result code of TS 29.272, 7.4, which travels as Experimental-Result. */
#define UNKNOWN_EPS_SUBSCRIPTION	5420

#define TOO_BUSY		"DIAMETER_TOO_BUSY"
#define UNABLE_TO_COMPLY	"DIAMETER_UNABLE_TO_COMPLY"
#define AUTHORIZATION_REJECTED	"DIAMETER_AUTHORIZATION_REJECTED"
#define INVALID_AVP_VALUE	"DIAMETER_INVALID_AVP_VALUE"

#pragma GCC visibility push(hidden)	/* nothing here is for the host, or for another extension */

/* message.c */

uint32_t command(struct msg *m);
uint32_t application(struct msg *m);
int message_well_formed(struct msg *m);
int parse(struct avp *a);	/* 0: the message must not be sent on with it */
void drop_all(msg_or_avp *parent, uint32_t vendor, uint32_t code);
int add_experimental(struct msg *m, uint32_t code);

/* request.c */

enum verdict refuse(struct job *j, const char *why, const char *result, uint32_t experimental);
enum verdict malformed(struct job *j, const char *result);
int asked_in_vain(struct job *j);
void count_outcome(struct job *j, enum counter done);
int passes(struct job *j);
const char *unavailable(struct job *j);
void text_of(struct avp *a, char *out, size_t room);
int read_request(struct job *j, struct msg *request);	/* 0: it cannot be read */
int is_spoofed(struct job *j);
const char *fault_of(struct msg *m);			/* NULL: there is none */
int within_rate(const char *origin);

/* s13.c */

enum verdict identity_check(struct job *j);

#pragma GCC visibility pop

#endif
