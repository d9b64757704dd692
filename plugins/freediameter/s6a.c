/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The procedure for a request and its answer. Each is a sequence of steps with a call to the service between two of
 * them: a step returns ASK if it has made a call. The first step runs in a thread of the host, all others in the calls'
 * thread.
 *
 * At the answer, the request is read again: freeDiameter keeps it until then.
 */
#include <errno.h>
#include <string.h>

#include "procedure.h"

#define RESYNC_INFO	30	/* RAND || AUTS (TS 29.272, 7.3.15; TS 29.229, 6.3.11) */
#define AUTHENTICATE	32	/* RAND || AUTN (TS 29.229, 6.3.10) */

/* Result codes of TS 29.272, 7.4, which travel as Experimental-Result. */
#define USER_UNKNOWN		5001
#define DATA_UNAVAILABLE	4181

static enum mode mode_of(uint32_t application)
{
	switch (application) {
	case SWX_APP:
	case WX_APP:
		return conf.swx;
	case CX_APP:
		return conf.cx;
	case ZH_APP:
		return conf.zh;
	}
	return MODE_PASS;
}

int s6a_takes(struct msg *m, int request)
{
	struct msg_hdr *h;
	enum mode mode;

	if (fd_msg_hdr(m, &h) || !!(h->msg_flags & CMD_FLAG_REQUEST) != request)
		return 0;
	if (h->msg_appl == S6A_APP)
		return h->msg_code == CMD_AIR || h->msg_code == CMD_ULR;
	if (h->msg_appl == S13_APP)
		return conf.s13 && request && h->msg_code == CMD_ECR;
	mode = mode_of(h->msg_appl);
	return h->msg_code == CMD_MAR && (mode == MODE_PROCESS || (mode == MODE_REFUSE && request));
}

/* Resynchronisation: the request has the RAND that was sent; the HSS needs the one that it made. */

static enum verdict restored(struct job *j);

static enum verdict restore_next(struct job *j)
{
	if (j->at == j->n)
		return GO_ON;
	kme_ask_restore(&j->call, j->imsi, j->origin, j->rands[j->at]);
	j->step = restored;
	return ASK;
}

static enum verdict restored(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;

	if (r->status == KME_NOT_BOUND)
		return GO_ON;	/* its RANDs stay as the HSS makes them */
	count_outcome(j, RESTORED);
	if (r->status == KME_OK) {
		memcpy(j->rands[j->at++], r->rands[0], KME_RAND);
		return restore_next(j);
	}
	if (passes(j))
		return GO_ON;
	if (r->status == KME_BUSY || application(j->msg) != S6A_APP)
		return refuse(j, r->reason, unavailable(j), 0);
	return refuse(j, r->reason, NULL, DATA_UNAVAILABLE);
}

static enum verdict authentication_request(struct job *j)
{
	static const uint32_t groups[] = { TGPP_REQUESTED_EUTRAN, TGPP_REQUESTED_UTRAN_GERAN };
	size_t i, size;

	for (i = 0; i < 2; i++) {
		struct avp *info = child(child(j->msg, VENDOR_3GPP, groups[i]), VENDOR_3GPP, TGPP_RESYNC_INFO);

		if (!info)
			continue;
		if (next(info, VENDOR_3GPP, TGPP_RESYNC_INFO))
			return malformed(j, "DIAMETER_AVP_OCCURS_TOO_MANY_TIMES");
		j->rands[j->n++] = octets(info, &size);
		if (size != RESYNC_INFO)
			return malformed(j, "DIAMETER_INVALID_AVP_LENGTH");
	}
	return restore_next(j);
}

/* ULR */

static int add_support(struct msg *m)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_supported_features, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, own_vendor_id));
	CHECK_FCT(add_u32(group, a_feature_list_id, 1));
	return add_u32(group, a_feature_list, 1);
}

static int add_binding_answer(struct msg *m, enum kme_status status, const uint8_t *nw_sig)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_binding_answer, &group));
	if (nw_sig)
		CHECK_FCT(add_octets(group, a_nw_sig, nw_sig, KME_NW_SIG));
	return add_u32(group, a_binding_status, status);
}

static enum kme_status on_the_wire(enum kme_status status)
{
	return status == KME_BUSY ? KME_UNAVAILABLE : status > KME_UNAVAILABLE ? KME_REFUSED : status;
}

/* A refused payload: the HSS is not asked. */
static enum verdict reject_payload(struct job *j, enum kme_status status, const char *why)
{
	enum verdict v = asked_in_vain(j) ? refuse(j, why, unavailable(j), 0) :
			 conf.authorization_rejected ? refuse(j, why, AUTHORIZATION_REJECTED, 0) :
			 refuse(j, why, NULL, UNKNOWN_EPS_SUBSCRIPTION);

	if (v != REPLY || add_support(j->msg) || add_binding_answer(j->msg, on_the_wire(status), NULL))
		return DROP;
	return REPLY;
}

/*
 * Replaces the payload in the request by its result, which the answer finds there. A Binding-Answer that came with a
 * ULR is removed.
 */
static enum verdict established(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;

	count_outcome(j, ESTABLISHED);
	if (r->status != KME_OK && !passes(j))
		return reject_payload(j, r->status, r->reason);
	drop_all(j->msg, own_vendor_id, OWN_BINDING_REQUEST);
	if (add_binding_answer(j->msg, on_the_wire(r->status), r->status == KME_OK ? r->nw_sig : NULL))
		return DROP;
	return GO_ON;
}

static enum verdict establish(struct job *j, struct avp *binding)
{
	struct avp *terminal = child(j->msg, VENDOR_3GPP, TGPP_TERMINAL_INFORMATION);
	struct avp *device = child(terminal, VENDOR_3GPP, TGPP_IMEI);
	struct avp *what = child(binding, own_vendor_id, OWN_BINDING_PAYLOAD);
	struct avp *which = child(binding, own_vendor_id, OWN_BINDING_ATTEMPT);
	char imei[17], attempt[KME_ATTEMPT + 1];
	size_t size, id_size;
	uint8_t *payload = octets(what, &size), *id = octets(which, &id_size);	/* case-sensitive */

	if (next(device, VENDOR_3GPP, TGPP_IMEI) || next(what, own_vendor_id, OWN_BINDING_PAYLOAD) ||
	    next(which, own_vendor_id, OWN_BINDING_ATTEMPT))
		return malformed(j, "DIAMETER_AVP_OCCURS_TOO_MANY_TIMES");
	if (!j->may_provision) {
		count(REFUSED);
		return reject_payload(j, KME_NOT_ALLOWED, "provisioning is not for this origin");
	}
	text_of(device, imei, sizeof(imei));
	if (id_size > KME_ATTEMPT)
		id_size = 0;
	if (id_size)
		memcpy(attempt, id, id_size);
	attempt[id_size] = 0;
	if (strlen(attempt) != id_size)
		*attempt = 0;
	kme_ask_establish(&j->call, j->imsi, j->origin, imei, attempt, payload, size);
	j->step = established;
	return ASK;
}

/*
 * Only a device that may be served passes: AKA has succeeded with a pre-processed vector, now or before. A ULR alone
 * does not prove that, so keysvc decides.
 */
static enum verdict reported(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;

	if (r->status != KME_NOT_BOUND)
		count_outcome(j, REPORTED);
	if ((r->status == KME_OK && r->control == KME_PREPROCESSED) || (r->status == KME_NOT_BOUND && j->legacy) ||
	    passes(j))
		return GO_ON;
	if (asked_in_vain(j))
		return refuse(j, r->reason, unavailable(j), 0);
	if (r->status == KME_OK || r->status == KME_NOT_BOUND)
		count(REFUSED);
	return refuse(j, r->status == KME_OK ? "its device may only provision" : r->reason, NULL,
		      UNKNOWN_EPS_SUBSCRIPTION);
}

static enum verdict location_request(struct job *j)
{
	struct avp *binding = child(j->msg, own_vendor_id, OWN_BINDING_REQUEST);

	drop_all(j->msg, own_vendor_id, OWN_BINDING_ANSWER);
	if (binding)
		return establish(j, binding);
	kme_ask_report(&j->call, j->imsi, j->origin, 1, j->no_provisioning);
	j->step = reported;
	return ASK;
}

static enum verdict told_of_error(struct job *j)
{
	return GO_ON;	/* if the report was lost, the binding ends by itself */
}

/*
 * The HSS decides: with its error there is no NW-Sig, and the binding ends. A device that provisions gets no
 * subscription data.
 */
static enum verdict location_answer(struct job *j, struct msg *request)
{
	struct avp *noted = child(request, own_vendor_id, OWN_BINDING_ANSWER);
	struct avp *code = child(j->msg, 0, BASE_RESULT_CODE);
	uint32_t status, result;
	uint8_t *nw_sig;
	size_t size;

	drop_all(j->msg, own_vendor_id, OWN_BINDING_ANSWER);
	if (!noted || !u32_of(child(noted, own_vendor_id, OWN_BINDING_STATUS), &status))
		return GO_ON;
	if (!code || !parse(code) || !u32_of(code, &result) || result / 1000 != 2) {
		if (status != KME_OK)
			return GO_ON;
		kme_ask_report(&j->call, j->imsi, j->origin, 0, 0);
		j->step = told_of_error;
		return ASK;
	}
	nw_sig = octets(child(noted, own_vendor_id, OWN_NW_SIG), &size);
	if (status == KME_OK)
		drop_all(j->msg, VENDOR_3GPP, TGPP_SUBSCRIPTION_DATA);
	if (add_support(j->msg) || add_binding_answer(j->msg, status, size == KME_NW_SIG ? nw_sig : NULL))
		return DROP;
	return GO_ON;
}

/* Vectors: either all of a message are prepared, or none is sent. */

static enum verdict withhold(struct job *j, const char *why, uint32_t experimental)
{
	struct msg_hdr *h;

	say_refused(j->msg, j->imsi, j->origin, why);
	drop_all(j->msg, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO);
	drop_all(j->msg, VENDOR_3GPP, TGPP_SIP_AUTH_DATA_ITEM);
	drop_all(j->msg, 0, BASE_RESULT_CODE);
	drop_all(j->msg, 0, BASE_EXPERIMENTAL_RESULT);
	if (!fd_msg_hdr(j->msg, &h))
		h->msg_flags &= (uint8_t)~CMD_FLAG_ERROR;
	if (application(j->msg) == S6A_APP)
		return add_experimental(j->msg, experimental) ? DROP : GO_ON;
	return fd_msg_rescode_set(j->msg, (char *)UNABLE_TO_COMPLY, NULL, NULL, 0) ? DROP : GO_ON;
}

static enum verdict withhold_unread(struct job *j)
{
	count(MALFORMED);
	return withhold(j, "its vectors cannot be read", DATA_UNAVAILABLE);
}

/* A RAND is at the beginning of an AVP of this size, which must be the only one of its code in the group. */
static int note_rand(struct job *j, struct avp *group, uint32_t code, size_t size)
{
	struct avp *a = child(group, VENDOR_3GPP, code);
	size_t has;

	if (j->n == KME_RANDS || !a || next(a, VENDOR_3GPP, code) || !(j->rands[j->n] = octets(a, &has)) || has != size)
		return 0;
	j->n++;
	return 1;
}

static int note_vectors(struct job *j, struct avp *info)
{
	static const uint32_t kinds[] = { TGPP_EUTRAN_VECTOR, TGPP_UTRAN_VECTOR, TGPP_GERAN_VECTOR };
	struct avp *v;
	size_t i;

	for (i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		for (v = child(info, VENDOR_3GPP, kinds[i]); v; v = next(v, VENDOR_3GPP, kinds[i]))
			if (!note_rand(j, v, TGPP_RAND, KME_RAND))
				return 0;
	return 1;
}

static int note_all(struct job *j, uint32_t group)
{
	struct avp *a;

	for (a = child(j->msg, VENDOR_3GPP, group); a; a = next(a, VENDOR_3GPP, group)) {
		if (!parse(a))
			return 0;
		if (group == TGPP_AUTHENTICATION_INFO) {
			if (!note_vectors(j, a))
				return 0;
		} else if (child(a, VENDOR_3GPP, TGPP_SIP_AUTHENTICATE) &&
			   !note_rand(j, a, TGPP_SIP_AUTHENTICATE, AUTHENTICATE)) {
			return 0;
		}
	}
	return 1;
}

static enum verdict prepared(struct job *j);

static enum verdict prepare(struct job *j)
{
	kme_ask_prepare(&j->call, j->imsi, j->origin, j->rands, j->n, j->no_provisioning);
	j->step = prepared;
	return ASK;
}

static enum verdict prepared(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;
	int s6a = application(j->msg) == S6A_APP;
	size_t i;

	if (r->status == KME_NOT_BOUND && !s6a)
		return GO_ON;
	if (r->status == KME_NOT_BOUND && j->legacy && j->no_provisioning) {
		j->no_provisioning = 0;
		return prepare(j);
	}
	count_outcome(j, PREPARED);
	if (passes(j))
		return GO_ON;
	if (r->status == KME_NOT_BOUND || r->status == KME_NOT_ALLOWED)
		return withhold(j, r->reason, UNKNOWN_EPS_SUBSCRIPTION);
	if (r->status != KME_OK)
		return withhold(j, r->reason, DATA_UNAVAILABLE);
	if (j->no_provisioning && r->control != KME_PREPROCESSED)
		return withhold(j, "keysvc opened provisioning where it may not", DATA_UNAVAILABLE);
	for (i = 0; i < j->n; i++)
		memcpy(j->rands[i], r->rands[i], KME_RAND);
	if (!s6a || (j->legacy && r->control == KME_PROVISIONING_ONLY))
		return GO_ON;
	if (add_support(j->msg) || add_u32(j->msg, a_binding_control, r->control) ||
	    (*r->attempt && add_octets(j->msg, a_binding_attempt, r->attempt, strlen(r->attempt))))
		return DROP;
	return GO_ON;
}

static enum verdict vectors_answer(struct job *j, uint32_t group)
{
	DiamId_t source = NULL;

	if (child(j->msg, own_vendor_id, OWN_BINDING_CONTROL) || !child(j->msg, VENDOR_3GPP, group))
		return GO_ON;	/* another kme.fdx has done it, or there are no vectors */
	if (fd_msg_source_get(j->msg, &source, NULL) || (source && !message_well_formed(j->msg)) || !note_all(j, group))
		return withhold_unread(j);
	return j->n ? prepare(j) : GO_ON;
}

/* SWx, Wx, Cx and Zh: Multimedia-Auth */

static enum verdict looked_up(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;

	if (r->status == KME_NOT_BOUND || (r->status == KME_OK && !r->bound) || passes(j))
		return GO_ON;
	if (r->status == KME_OK) {
		count(REFUSED);
		return refuse(j, "a bound subscription is for S6a only", AUTHORIZATION_REJECTED, 0);
	}
	count_outcome(j, REFUSED);
	return refuse(j, r->reason, unavailable(j), 0);
}

static enum verdict multimedia_request(struct job *j)
{
	struct avp *item, *a;
	uint8_t *info;
	size_t size;

	if (!*j->imsi) {	/* only the HSS knows the subscription */
		count(REFUSED);
		return refuse(j, "its User-Name is no IMSI of 15 digits", AUTHORIZATION_REJECTED, 0);
	}
	if (mode_of(application(j->msg)) == MODE_REFUSE) {
		kme_ask_binding(&j->call, j->imsi);
		j->step = looked_up;
		return ASK;
	}
	item = child(j->msg, VENDOR_3GPP, TGPP_SIP_AUTH_DATA_ITEM);
	for (; item; item = next(item, VENDOR_3GPP, TGPP_SIP_AUTH_DATA_ITEM)) {
		if (!parse(item))
			return malformed(j, "DIAMETER_INVALID_AVP_LENGTH");
		a = child(item, VENDOR_3GPP, TGPP_SIP_AUTHORIZATION);
		if (!a)
			continue;
		if (j->n == KME_RANDS || next(a, VENDOR_3GPP, TGPP_SIP_AUTHORIZATION))
			return malformed(j, "DIAMETER_AVP_OCCURS_TOO_MANY_TIMES");
		info = octets(a, &size);
		if (size == RESYNC_INFO)	/* otherwise it is another scheme's */
			j->rands[j->n++] = info;
	}
	return restore_next(j);
}

enum verdict s6a_request(struct job *j)
{
	const char *fault = "DIAMETER_INVALID_AVP_LENGTH";

	if (application(j->msg) == S13_APP && j->kind == REQUEST_PASSING)
		return GO_ON;	/* it is for another register */
	if (dict_ready())
		return refuse(j, "the dictionary cannot be used", UNABLE_TO_COMPLY, 0);
	if ((j->kind == REQUEST_PASSING && !message_well_formed(j->msg)) || (fault = fault_of(j->msg)))
		return malformed(j, fault);
	if (!read_request(j, j->msg))
		return malformed(j, "DIAMETER_INVALID_AVP_LENGTH");
	if (is_spoofed(j)) {
		count(SPOOFED);
		return refuse(j, "Origin-Host is not the peer's name, and the peer is no agent", UNABLE_TO_COMPLY, 0);
	}
	if (!within_rate(j->origin)) {
		count(LIMITED);
		return refuse(j, "more than origin_rate requests a second", TOO_BUSY, 0);
	}
	if (command(j->msg) == CMD_ECR)
		return identity_check(j);
	if (command(j->msg) == CMD_MAR)
		return multimedia_request(j);
	if (!*j->imsi) {
		count(REFUSED);
		return refuse(j, "its User-Name is no IMSI", NULL, USER_UNKNOWN);
	}
	return command(j->msg) == CMD_AIR ? authentication_request(j) : location_request(j);
}

enum verdict s6a_answer(struct job *j)
{
	struct msg *request = NULL;

	if (dict_ready() || fd_msg_answ_getq(j->msg, &request) || !request || !read_request(j, request))
		return DROP;
	j->n = j->at = 0;
	switch (command(j->msg)) {
	case CMD_AIR:
		return vectors_answer(j, TGPP_AUTHENTICATION_INFO);
	case CMD_ULR:
		return location_answer(j, request);
	}
	j->no_provisioning = 1;
	j->legacy = 0;
	return vectors_answer(j, TGPP_SIP_AUTH_DATA_ITEM);
}
