/* SPDX-License-Identifier: Apache-2.0 */
/* Requests to keysvc and its answers: the messages of kme.proto. */
#include "stream.h"

#include <stdio.h>
#include <string.h>

#define MAX_PAYLOAD	512		/* a lot of 4096 bits */

static int only(const char *s, const char *allowed, size_t least, size_t most)
{
	size_t n = strnlen(s, most + 1);

	return n >= least && n <= most && strspn(s, allowed) == n;
}

static int is_digits(const char *s)
{
	return only(s, "0123456789", 6, 16);
}

static int is_attempt(const char *s)
{
	return only(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", 1, KME_ATTEMPT);
}

void kme_reply_is(struct kme_reply *r, enum kme_status status, const char *reason)
{
	memset(r, 0, sizeof(*r));
	r->status = status;
	snprintf(r->reason, sizeof(r->reason), "%s", reason);
}

void kme_parse_error(const char *reason, size_t size, struct kme_reply *out)
{
	char said[KME_REASON + 1] = "";

	static const struct {
		const char *reason;
		enum kme_status status;
	} known[] = {
		{ "NO_ATTEMPT", KME_NO_ATTEMPT }, { "NOT_BOUND", KME_NOT_BOUND },
		{ "CALLER_NOT_ALLOWED", KME_NOT_ALLOWED }, { "MALFORMED", KME_REFUSED },
		{ "UNKNOWN_DEVICE", KME_REFUSED }, { "REVOKED_DEVICE", KME_REFUSED },
		{ "OTHER_DEVICE", KME_REFUSED }, { "KME_REJECTED", KME_REFUSED },
		/* Not KME_UNAVAILABLE: then open IMSIs would pass, and whoever changes the database could cause that. */
		{ "DAMAGED", KME_REFUSED }, { "ROLLED_BACK", KME_REFUSED },
	};
	size_t i;

	if (size <= KME_REASON)
		memcpy(said, reason, size);
	if (!only(said, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_", 1, KME_REASON) || strlen(said) != size)
		strcpy(said, NO_REASON);
	kme_reply_is(out, KME_UNAVAILABLE, said);	/* also for an answer that is not understood */
	for (i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (!strcmp(said, known[i].reason))
			out->status = known[i].status;
}

static int exactly(const struct wire_in *i, uint8_t *to, size_t size)
{
	if (!i->data || i->size != size)
		return 0;
	memcpy(to, i->data, size);
	return 1;
}

/* There is an attempt only with PROVISIONING_ONLY. */
static int parse_prepared(struct wire_in *i, size_t asked, struct kme_reply *out)
{
	size_t rands = 0;

	while (wire_next(i))
		switch (i->field) {
		case 1:
			if (rands == asked || !exactly(i, out->rands[rands++], KME_RAND))
				return 0;
			break;
		case 2:
			out->control = (enum kme_control)i->number;
			break;
		case 3:
			if (!i->data || i->size > KME_ATTEMPT)
				return 0;
			memcpy(out->attempt, i->data, i->size);
			out->attempt[i->size] = 0;
			break;
		}
	return rands == asked && (out->control == KME_PREPROCESSED ? !*out->attempt :
				  out->control == KME_PROVISIONING_ONLY && is_attempt(out->attempt));
}

static int parse_reported(struct wire_in *i, struct kme_reply *out)
{
	while (wire_next(i))
		if (i->field == 2)
			out->control = (enum kme_control)i->number;
	return out->control == KME_PREPROCESSED || out->control == KME_PROVISIONING_ONLY;
}

/* The field that matters, which must have this size. */
static int parse_octets(struct wire_in *i, uint8_t *to, size_t size)
{
	int there = 0;

	while (wire_next(i))
		if (i->field == 1 && !(there = exactly(i, to, size)))
			return 0;
	return there;
}

static int parse_binding(struct wire_in *i, struct kme_reply *out)
{
	enum { PENDING = 1, ACTIVE, REVOKED };
	uint64_t state = 0;

	while (wire_next(i))
		if (i->field == 5)
			state = i->number;
	out->bound = state == PENDING || state == ACTIVE;
	return out->bound || state == REVOKED;
}

static int parse_equipment(struct wire_in *i, struct kme_reply *out)
{
	uint64_t status = 0;

	while (wire_next(i))
		if (i->field == 1)
			status = i->number;
	out->equipment = (enum kme_equipment)status;
	return status >= KME_WHITELISTED && status <= KME_BLACKLISTED;
}

void kme_parse(enum kme_method method, const void *response, size_t size, size_t asked, struct kme_reply *out)
{
	struct wire_in i = wire_open(response, size);
	int ok = 0;

	kme_reply_is(out, KME_OK, "");
	switch (method) {
	case KME_PREPARE:
		ok = asked <= KME_RANDS && parse_prepared(&i, asked, out);
		break;
	case KME_ESTABLISH:
		ok = parse_octets(&i, out->nw_sig, KME_NW_SIG);
		break;
	case KME_REPORT:
		ok = parse_reported(&i, out);
		break;
	case KME_RESTORE:
		ok = parse_octets(&i, out->rands[0], KME_RAND);
		break;
	case KME_BINDING:
		ok = parse_binding(&i, out);
		break;
	case KME_EQUIPMENT:
		ok = parse_equipment(&i, out);
		break;
	}
	if (!ok || i.broken)
		kme_reply_is(out, KME_UNAVAILABLE, NO_ANSWER);
}

/* Whether the request is valid. If so, write its fields, the last one first. */
static int asks(struct kme_call *c, enum kme_method method, int well)
{
	c->method = method;
	c->once = 0;
	c->request = (struct wire_out){ .data = well ? c->octets : NULL, .from = KME_CALL, .end = KME_CALL };
	kme_reply_is(&c->reply, well ? KME_UNAVAILABLE : KME_REFUSED, well ? "not asked" : "MALFORMED");
	return well;
}

void kme_ask_prepare(struct kme_call *c, const char *imsi, const char *origin, uint8_t *const *rands, size_t n,
		     int no_provisioning)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_PREPARE, is_digits(imsi) && n && n <= KME_RANDS))
		return;
	wire_number(o, 4, (uint64_t)no_provisioning);
	wire_text(o, 3, origin);
	for (c->asked = n; n; n--)
		wire_bytes(o, 2, rands[n - 1], KME_RAND);
	wire_text(o, 1, imsi);
}

void kme_ask_establish(struct kme_call *c, const char *imsi, const char *origin, const char *imei, const char *attempt,
		       const uint8_t *payload, size_t size)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_ESTABLISH, is_digits(imsi) && is_digits(imei) && is_attempt(attempt) && size &&
		  size <= MAX_PAYLOAD))
		return;
	wire_text(o, 5, origin);
	wire_bytes(o, 4, payload, size);
	wire_text(o, 3, attempt);
	wire_text(o, 2, imei);
	wire_text(o, 1, imsi);
}

void kme_ask_report(struct kme_call *c, const char *imsi, const char *origin, int ok, int no_provisioning)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_REPORT, is_digits(imsi)))
		return;
	c->once = !ok;
	wire_number(o, 4, (uint64_t)no_provisioning);
	wire_text(o, 3, origin);
	wire_number(o, 2, (uint64_t)ok);
	wire_text(o, 1, imsi);
}

void kme_ask_restore(struct kme_call *c, const char *imsi, const char *origin, const uint8_t *rand)
{
	struct wire_out *o = &c->request;

	if (!asks(c, KME_RESTORE, is_digits(imsi)))
		return;
	wire_text(o, 3, origin);
	wire_bytes(o, 2, rand, KME_RAND);
	wire_text(o, 1, imsi);
}

void kme_ask_binding(struct kme_call *c, const char *imsi)
{
	if (asks(c, KME_BINDING, is_digits(imsi)))
		wire_text(&c->request, 1, imsi);
}

void kme_ask_equipment(struct kme_call *c, const char *imei, const char *imsi)
{
	if (!asks(c, KME_EQUIPMENT, is_digits(imei) && (!*imsi || is_digits(imsi))))
		return;
	wire_text(&c->request, 2, imsi);
	wire_text(&c->request, 1, imei);
}

/* The message of a call, with the time that it has. 0: it is too long. */
int kme_write_call(struct kme_call *c, uint64_t ms)
{
	struct wire_out *o = &c->request;

	o->from = c->asks;
	wire_message(o, FIRST_METHOD + (uint32_t)c->method, KME_CALL);
	wire_number(o, CALL_TIMEOUT, ms);
	wire_number(o, CALL_ID, c->id);
	wire_message(o, CALLS, KME_CALL);
	return !o->full;
}
