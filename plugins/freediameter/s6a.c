/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The procedure: what becomes of a request and of its answer. Each is a row of steps, with a call of the service
 * between one and the next; a step returns ASK when it has asked something. The first runs in a thread of the host, all
 * others in that of the calls.
 *
 * What a request says of itself is read again at its answer: freeDiameter keeps the request of an answer that is
 * awaited.
 */
#include <ctype.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "kme.h"

#define RESYNC_INFO	30	/* RAND || AUTS (TS 29.272, 7.3.15; TS 29.229, 6.3.11) */
#define AUTHENTICATE	32	/* RAND || AUTN (TS 29.229, 6.3.10) */
#define NO_STATE_MAINTAINED	1

/* Result codes of TS 29.272, 7.4, which travel as Experimental-Result. */
#define USER_UNKNOWN			5001
#define UNKNOWN_EPS_SUBSCRIPTION	5420
#define DATA_UNAVAILABLE		4181
#define EQUIPMENT_UNKNOWN		5422

#define TOO_BUSY		"DIAMETER_TOO_BUSY"
#define UNABLE_TO_COMPLY	"DIAMETER_UNABLE_TO_COMPLY"
#define AUTHORIZATION_REJECTED	"DIAMETER_AUTHORIZATION_REJECTED"
#define INVALID_AVP_VALUE	"DIAMETER_INVALID_AVP_VALUE"

static uint32_t command(struct msg *m)
{
	struct msg_hdr *h;

	return fd_msg_hdr(m, &h) ? 0 : h->msg_code;
}

static uint32_t application(struct msg *m)
{
	struct msg_hdr *h;

	return fd_msg_hdr(m, &h) ? 0 : h->msg_appl;
}

static enum mode mode_of(uint32_t application)
{
	switch (application) {
	case SWX_APP:
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

/*
 * fd_msg_parse_dict() of a group with a damaged AVP in it leaves it half parsed, and what is sent on is cut short. So
 * what we parse ourselves, that which passes, is looked through first.
 */
static int well_formed(const uint8_t *p, size_t n, int depth)
{
	while (n) {
		size_t head, size;
		uint32_t code, vendor = 0;

		if (n < 8)
			return 0;
		head = p[4] & AVP_FLAG_VENDOR ? 12 : 8;
		size = (size_t)p[5] << 16 | (size_t)p[6] << 8 | p[7];
		if (size < head || size > n)
			return 0;
		code = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
		if (head == 12)
			vendor = (uint32_t)p[8] << 24 | (uint32_t)p[9] << 16 | (uint32_t)p[10] << 8 | p[11];
		if (depth < 3 && is_group(vendor, code) && !well_formed(p + head, size - head, depth + 1))
			return 0;
		size = (size + 3) & ~(size_t)3;
		if (size > n)
			size = n;
		p += size;
		n -= size;
	}
	return 1;
}

static int message_well_formed(struct msg *m)
{
	uint8_t *bytes = NULL;
	size_t size = 0;
	int ok;

	if (fd_msg_bufferize(m, &bytes, &size))
		return 0;
	ok = size >= 20 && well_formed(bytes + 20, size - 20, 0);
	free(bytes);
	return ok;
}

/* An AVP that has no data, and that the dictionary does not know, cannot be sent any more once it has been parsed. */
static int sendable(struct avp *a)
{
	struct dict_object *model = NULL;
	struct avp_hdr *h;
	struct avp *in;

	if (fd_msg_avp_hdr(a, &h) || fd_msg_model(a, &model) || fd_msg_browse(a, MSG_BRW_FIRST_CHILD, &in, NULL))
		return 0;
	for (; in; fd_msg_browse(in, MSG_BRW_NEXT, &in, NULL))
		if (!sendable(in))
			return 0;
	return model || h->avp_len > (h->avp_flags & AVP_FLAG_VENDOR ? 12u : 8u);
}

/* Parses an AVP with all that is in it, by the dictionary. If that fails, the message must not be sent on with it. */
static int parse(struct avp *a)
{
	struct fd_pei pei;

	memset(&pei, 0, sizeof(pei));
	if (!fd_msg_parse_dict(a, fd_g_config->cnf_dict, &pei))
		return sendable(a);
	if (pei.pei_avp_free)
		fd_msg_free(pei.pei_avp);
	return 0;
}

static void drop_all(msg_or_avp *parent, uint32_t vendor, uint32_t code)
{
	struct avp *a;

	while ((a = child(parent, vendor, code)))
		if (fd_msg_free(a))
			return;
}

static int add_experimental(struct msg *m, uint32_t code)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_experimental_result, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, VENDOR_3GPP));
	return add_u32(group, a_experimental_result_code, code);
}

/* An AVP of the base protocol that has a value, or children, as the dictionary wants them. */
static int sound(struct avp *a)
{
	struct avp_hdr *h;

	return !fd_msg_avp_hdr(a, &h) && !(h->avp_flags & AVP_FLAG_VENDOR) && parse(a) &&
	       (h->avp_code == BASE_PROXY_INFO || h->avp_value);
}

/* 1.2.1 ends the process over a Session-Id with the V bit in a request that it has only passed on so far. */
static void drop_unsound_session(struct msg *m)
{
	struct avp *a;

	while ((a = child(m, 0, BASE_SESSION_ID)) && !sound(a))
		if (fd_msg_free(a))
			return;
}

/* What proxies want back (RFC 6733, 6.2). The library's own way of it leaks when a Proxy-Info is damaged. */
static int add_proxies(struct msg *m)
{
	struct msg *request = NULL;
	struct avp *a, *group;
	uint8_t *host, *state;
	size_t host_size, state_size;

	CHECK_FCT(fd_msg_answ_getq(m, &request));
	for (a = child(request, 0, BASE_PROXY_INFO); a; a = next(a, 0, BASE_PROXY_INFO)) {
		if (!sound(a) || !(host = octets(child(a, 0, BASE_PROXY_HOST), &host_size)) ||
		    !(state = octets(child(a, 0, BASE_PROXY_STATE), &state_size)))
			continue;
		CHECK_FCT(add_group(m, a_proxy_info, &group));
		CHECK_FCT(add_octets(group, a_proxy_host, host, host_size));
		CHECK_FCT(add_octets(group, a_proxy_state, state, state_size));
	}
	return 0;
}

/*
 * Makes the answer to a request: with a result of RFC 6733 by its name, or one of 3GPP's. It has all that TS 29.272 and
 * TS 29.229 make mandatory; an MME may drop one that has not. The E bit is only for results 3xxx (RFC 6733, 7.2).
 */
int s6a_refuse(struct msg **m, const char *result, uint32_t experimental)
{
	struct avp *group;

	drop_unsound_session(*m);
	CHECK_FCT(fd_msg_new_answer_from_req(fd_g_config->cnf_dict, m, MSGFL_ANSW_NOPROXYINFO));
	CHECK_FCT(add_group(*m, a_vendor_specific_application_id, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, VENDOR_3GPP));
	CHECK_FCT(add_u32(group, a_auth_application_id, application(*m)));
	CHECK_FCT(add_u32(*m, a_auth_session_state, NO_STATE_MAINTAINED));
	if (result) {
		CHECK_FCT(fd_msg_rescode_set(*m, (char *)result, NULL, NULL, 1));
	} else {
		CHECK_FCT(fd_msg_add_origin(*m, 0));
		CHECK_FCT(add_experimental(*m, experimental));
	}
	return add_proxies(*m);
}

static enum verdict refuse(struct job *j, const char *why, const char *result, uint32_t experimental)
{
	say_refused(j->msg, j->imsi, j->origin, why);
	return s6a_refuse(&j->msg, result, experimental) ? DROP : REPLY;
}

/* The answer to a request that cannot be read, or means two things. */
static enum verdict malformed(struct job *j, const char *result)
{
	count(MALFORMED);
	return refuse(j, "it is malformed", result, 0);
}

static int asked_in_vain(struct job *j)
{
	return j->call.reply.status == KME_UNAVAILABLE || j->call.reply.status == KME_BUSY;
}

static void count_outcome(struct job *j, enum counter done)
{
	enum kme_status status = j->call.reply.status;

	count(status == KME_OK ? done :
	      status == KME_BUSY ? OVERLOADED :
	      status == KME_UNAVAILABLE ? UNAVAILABLE : REFUSED);
}

/* Whether the service cannot be asked and this IMSI may pass all the same. */
static int passes(struct job *j)
{
	int i;

	if (!asked_in_vain(j))
		return 0;
	for (i = 0; i < conf.open.n; i++)
		if (!strncmp(j->imsi, conf.open.of[i], strlen(conf.open.of[i]))) {
			count(PASSED_OPEN);
			return 1;
		}
	return 0;
}

static const char *unavailable(struct job *j)
{
	return j->call.reply.status == KME_BUSY ? TOO_BUSY : UNABLE_TO_COMPLY;
}

/* Who asks, and what for */

/* The text in an AVP, in lower case. It is empty if there is none, or not one of visible ASCII that has room. */
static void text_of(struct avp *a, char *out, size_t room)
{
	size_t size, i;
	uint8_t *s = octets(a, &size);

	*out = 0;
	if (!s || size >= room)
		return;
	for (i = 0; i < size; i++)
		if (s[i] < 0x21 || s[i] > 0x7e)
			return;
	for (i = 0; i < size; i++)
		out[i] = (char)tolower(s[i]);
	out[size] = 0;
}

static int is_imsi(const char *s)
{
	size_t n = strlen(s);

	return n >= 6 && n <= 15 && strspn(s, "0123456789") == n;
}

/*
 * User-Name is an IMSI in S6a and S13. Elsewhere it may be an NAI with one: of EAP-AKA (0) and EAP-AKA' (6), and of
 * IMS. An HSS may read an IMSI where there is none for others: all digits of the name, the realm's too, or an MSISDN
 * (Open5GS 2.8 does both). So there it has 15 digits, beside which no other is left to be read.
 */
static void read_imsi(struct job *j, struct msg *request)
{
	char name[MAX_ORIGIN + 1], *imsi = name;

	text_of(child(request, 0, BASE_USER_NAME), name, sizeof(name));
	if (application(request) != S6A_APP && application(request) != S13_APP) {
		name[strcspn(name, "@")] = 0;
		if (strlen(name) == 16 && (*name == '0' || *name == '6'))
			imsi++;
		if (strlen(imsi) != 15)
			*imsi = 0;
	}
	snprintf(j->imsi, sizeof(j->imsi), "%s", is_imsi(imsi) ? imsi : "");
}

/* Whether the MME knows binding (TS 29.229, 6.3.29). 0: it does not say it so that one can read it. */
static int read_features(struct job *j, struct msg *request)
{
	struct avp *a;
	uint32_t vendor, id, features;

	j->announced = 0;
	a = child(request, VENDOR_3GPP, TGPP_SUPPORTED_FEATURES);
	for (; a; a = next(a, VENDOR_3GPP, TGPP_SUPPORTED_FEATURES)) {
		if (!parse(a))
			return 0;
		if (u32_of(child(a, 0, BASE_VENDOR_ID), &vendor) && vendor == own_vendor_id &&
		    u32_of(child(a, VENDOR_3GPP, TGPP_FEATURE_LIST_ID), &id) && id == 1 &&
		    u32_of(child(a, VENDOR_3GPP, TGPP_FEATURE_LIST), &features) && features & 1)
			j->announced = 1;
	}
	return 1;
}

/* The digits of MCC and MNC (TS 29.272, 7.3.9). */
static void read_plmn(struct msg *request, char out[7])
{
	size_t size;
	uint8_t *p = octets(child(request, VENDOR_3GPP, TGPP_VISITED_PLMN_ID), &size);

	*out = 0;
	if (!p || size != 3)
		return;
	snprintf(out, 7, "%x%x%x%x%x%x", p[0] & 15, p[0] >> 4, p[1] & 15, p[2] & 15, p[2] >> 4, p[1] >> 4);
	if (out[5] == 'f')	/* an MNC of two digits */
		out[5] = 0;
	if (strspn(out, "0123456789") != strlen(out))
		*out = 0;
}

/* Whether a realm is a PLMN's, or below it (TS 23.003, 19.2). */
static int is_of_plmn(const char *realm, const char *plmn)
{
	char want[64];
	size_t size = strlen(realm), tail;

	snprintf(want, sizeof(want), ".epc.mnc%s%s.mcc%.3s.3gppnetwork.org", strlen(plmn) == 5 ? "0" : "", plmn + 3,
		 plmn);
	tail = strlen(want);
	return !strcmp(realm, want + 1) || (size > tail && !strcmp(realm + size - tail, want));
}

static int may_provision(struct job *j, struct msg *request)
{
	char plmn[7], realm[MAX_ORIGIN + 1];
	int i;

	if (!j->announced)
		return 0;
	read_plmn(request, plmn);
	text_of(child(request, 0, BASE_ORIGIN_REALM), realm, sizeof(realm));
	for (i = 0; i < conf.provision_from.n; i++) {
		const char *from = conf.provision_from.of[i];

		if (!strcmp(from, "any"))
			return 1;
		if (!*plmn)
			continue;
		if (strcmp(from, "home") ? !strcmp(from, plmn) && is_of_plmn(realm, plmn) :
					   !strncmp(j->imsi, plmn, strlen(plmn)) &&
					   (is_of_plmn(realm, plmn) || conf_names(&conf.home_realms, realm)))
			return 1;
	}
	return 0;
}

/* 0: it cannot be read */
static int read_request(struct job *j, struct msg *request)
{
	text_of(child(request, 0, BASE_ORIGIN_HOST), j->origin, sizeof(j->origin));
	read_imsi(j, request);
	if (!read_features(j, request))
		return 0;
	j->may_provision = may_provision(j, request);
	j->legacy = !j->announced && conf_names(&conf.legacy_mmes, j->origin);
	j->no_provisioning = !j->may_provision;
	return 1;
}

/* A request that comes straight from a peer is the peer's own, unless it is known to pass on what others ask. */
static int is_spoofed(struct job *j)
{
	DiamId_t source = NULL;

	return !*j->origin || fd_msg_source_get(j->msg, &source, NULL) ||
	       (source && strcasecmp(source, j->origin) && !conf_names(&conf.agents, source));
}

/*
 * Parses what is read of a request: of one that passes, only the top level is parsed, and not even its values. An AVP
 * that is there twice would mean two things: whoever took the second for the first would look at somebody else's.
 */
static const char *fault_of(struct msg *m)
{
	const struct {
		uint32_t vendor, code;
	} once[] = {
		{ 0, BASE_USER_NAME }, { 0, BASE_ORIGIN_HOST }, { 0, BASE_ORIGIN_REALM },
		{ VENDOR_3GPP, TGPP_VISITED_PLMN_ID }, { VENDOR_3GPP, TGPP_TERMINAL_INFORMATION },
		{ VENDOR_3GPP, TGPP_REQUESTED_EUTRAN }, { VENDOR_3GPP, TGPP_REQUESTED_UTRAN_GERAN },
		{ own_vendor_id, OWN_BINDING_REQUEST },
	};
	struct avp *a;
	size_t i;

	for (i = 0; i < sizeof(once) / sizeof(*once); i++) {
		a = child(m, once[i].vendor, once[i].code);
		if (next(a, once[i].vendor, once[i].code))
			return "DIAMETER_AVP_OCCURS_TOO_MANY_TIMES";
		if (a && !parse(a))
			return "DIAMETER_INVALID_AVP_LENGTH";
	}
	return NULL;
}

/* A second's requests at once, and then as many a second. Of more origins than there is room for, some share. */
static int within_rate(const char *origin)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static struct {
		uint64_t who, full_at;	/* when it may have a second's worth again, in microseconds */
	} buckets[1024], *b, *mine;
	static uint64_t seed;
	const size_t count = sizeof(buckets) / sizeof(*buckets);
	uint64_t now = kme_now() * 1000, who;
	size_t i;
	int within;

	pthread_mutex_lock(&lock);
	if (!seed && getrandom(&seed, sizeof(seed), GRND_NONBLOCK) != sizeof(seed))
		seed = now;
	for (who = seed; *origin; origin++)
		who = (who ^ (uint8_t)*origin) * 0x100000001b3u;	/* FNV-1a */
	for (mine = NULL, i = 0; i < 8; i++) {
		b = &buckets[(who + i) % count];
		if (b->who == who) {
			mine = b;
			break;
		}
		if (!mine && b->full_at <= now)
			mine = b;
	}
	if (!mine)
		mine = &buckets[who % count];
	if (mine->full_at <= now) {
		mine->who = who;
		mine->full_at = now;
	}
	within = mine->full_at < now + 1000000;
	if (within)
		mine->full_at += 1000000 / (uint64_t)conf.origin_rate;
	pthread_mutex_unlock(&lock);
	return within;
}

/* Resynchronisation: what comes back is the RAND that was sent; the HSS needs the one that it made. */

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
		return GO_ON;	/* its RANDs are as the HSS makes them */
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

/* A payload that is not taken: the HSS is not asked. */
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
 * What came of a payload stands in the request from here on, in the place of the payload: the answer finds it there. A
 * Binding-Answer that others have put there is removed from every ULR.
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
	char imei[17], attempt[KME_ATTEMPT + 1];
	size_t size;
	uint8_t *payload = octets(child(binding, own_vendor_id, OWN_BINDING_PAYLOAD), &size), *id;
	size_t id_size;

	if (!j->may_provision) {
		count(REFUSED);
		return reject_payload(j, KME_NOT_ALLOWED, "provisioning is not for this origin");
	}
	text_of(child(terminal, VENDOR_3GPP, TGPP_IMEI), imei, sizeof(imei));
	id = octets(child(binding, own_vendor_id, OWN_BINDING_ATTEMPT), &id_size);	/* in which case matters */
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
 * Only a device that may be served passes: AKA has succeeded with a pre-processed vector, now or before. A ULR alone is
 * no proof of that, and keysvc does not take it for one.
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
	return GO_ON;	/* if it was in vain, the binding ends by itself */
}

/*
 * The HSS decides: beside its error there is no NW-Sig, and the binding is none. A device that provisions gets no
 * subscription.
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

/* Vectors: all of a message are prepared, or none leaves. */

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

/* A RAND is the first octets of an AVP of this size: the only one of its code in the group. */
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
		return GO_ON;	/* another of us was here, or there are no vectors */
	if (fd_msg_source_get(j->msg, &source, NULL) || (source && !message_well_formed(j->msg)) || !note_all(j, group))
		return withhold_unread(j);
	return j->n ? prepare(j) : GO_ON;
}

/* SWx, Cx and Zh: Multimedia-Auth */

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

	if (!*j->imsi) {	/* whose SIM it is only the HSS can tell */
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
		if (size == RESYNC_INFO)	/* else it is of another scheme */
			j->rands[j->n++] = info;
	}
	return restore_next(j);
}

/* S13: ME-Identity-Check (TS 29.272, 6) */

/* Equipment-Status (TS 29.272, 7.3.51). */
static uint32_t on_s13(enum kme_equipment equipment)
{
	enum { WHITELISTED, BLACKLISTED, GREYLISTED };

	return equipment == KME_BLACKLISTED ? BLACKLISTED : equipment == KME_GREYLISTED ? GREYLISTED : WHITELISTED;
}

static enum verdict answer_status(struct job *j, enum kme_equipment equipment)
{
	if (s6a_refuse(&j->msg, "DIAMETER_SUCCESS", 0) || add_u32(j->msg, a_equipment_status, on_s13(equipment)))
		return DROP;
	return REPLY;
}

static enum verdict equipment_unknown(struct job *j)
{
	count(CHECKED);
	return s6a_refuse(&j->msg, NULL, EQUIPMENT_UNKNOWN) ? DROP : REPLY;
}

static enum verdict checked(struct job *j)
{
	const struct kme_reply *r = &j->call.reply;

	if (!strcmp(r->reason, "UNKNOWN_DEVICE"))
		return equipment_unknown(j);
	count_outcome(j, CHECKED);
	if (r->status == KME_OK)
		return answer_status(j, r->equipment);
	if (passes(j))
		return answer_status(j, KME_WHITELISTED);
	if (r->status == KME_NOT_ALLOWED)
		return refuse(j, r->reason, AUTHORIZATION_REJECTED, 0);
	return refuse(j, r->reason, strcmp(r->reason, "MALFORMED") ? unavailable(j) : INVALID_AVP_VALUE, 0);
}

/* Only an IMEI can be of a lot: a device with a MEID alone is unknown. */
static enum verdict identity_check(struct job *j)
{
	struct avp *terminal = child(j->msg, VENDOR_3GPP, TGPP_TERMINAL_INFORMATION);
	struct avp *a = child(terminal, VENDOR_3GPP, TGPP_IMEI);
	char imei[17];

	if (!a && child(terminal, VENDOR_3GPP, TGPP_3GPP2_MEID))
		return equipment_unknown(j);
	if (!a)
		return malformed(j, "DIAMETER_MISSING_AVP");
	if (next(a, VENDOR_3GPP, TGPP_IMEI))
		return malformed(j, "DIAMETER_AVP_OCCURS_TOO_MANY_TIMES");
	text_of(a, imei, sizeof(imei));
	if (strlen(imei) == 15 && imei[14] == '0')
		imei[14] = 0;	/* the spare digit, which a device sends in the place of the check digit (TS 23.003, 6.2.1) */
	if (strlen(imei) < 14 || (!*j->imsi && child(j->msg, 0, BASE_USER_NAME)))
		return malformed(j, INVALID_AVP_VALUE);
	kme_ask_equipment(&j->call, imei, j->imsi);
	j->step = checked;
	return ASK;
}

enum verdict s6a_request(struct job *j)
{
	const char *fault = "DIAMETER_INVALID_AVP_LENGTH";

	if (application(j->msg) == S13_APP && j->kind == REQUEST_PASSING)
		return GO_ON;	/* to another register */
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
