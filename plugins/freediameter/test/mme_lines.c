/* SPDX-License-Identifier: Apache-2.0 */
/*
 *	AIR id imsi vectors resync|- [option]...
 *	ULR id imsi imei payload|- attempt|- [option]...
 *	MAR id cx|swx|zh|wx user items auts|- [option]...
 *	RAW id code flags avps|-
 *
 *	AIA id result control|- attempt|- [rand:xres:autn:kasme | u:rand:xres:autn:ck:ik | g:rand:sres:kc]...
 *	ULA id result status|- nw_sig|- data|-
 *	MAA id result [authenticate]...
 *	ERR id reason
 *
 * Options: host=H and realm=R, Origin-Host and Origin-Realm; plmn=00101, Visited-PLMN-Id; plain, Supported-Features is
 * left out; utran=N and uresync=HEX, Requested-UTRAN-GERAN-Authentication-Info.
 *
 * An answer that a strict MME drops is "ERR id dropped REASON": one that breaks the grammar of TS 29.272, and what
 * Open5GS 2.8 drops in its callbacks: a success without E-UTRAN vectors where they were asked for, without ULA-Flags
 * or, unless it is for provisioning, without Subscription-Data. (It drops every ULA that is an error, also its own
 * HSS's, for want of ULA-Flags: that is not done here.)
 */
#include "mme.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define RAT_EUTRAN	1004u		/* TS 29.212, 5.3.31 */
#define ULR_FLAGS	0x22u		/* S6a indicator, initial attach */
#define SUCCESS		2001u

struct options {
	const char *host, *realm, *plmn;
	char *uresync;
	uint64_t utran;
	int plain;
};

/* Answers */

static int say_hex(struct text *t, const char *before, struct avp *avp)
{
	static const char digits[] = "0123456789abcdef";
	size_t size, i;
	const uint8_t *data = octets(avp, &size);

	CHECK_FCT(text_add(t, before, strlen(before)));
	for (i = 0; i < size; i++)
		CHECK_FCT(text_add(t, (char[]){ digits[data[i] >> 4], digits[data[i] & 15] }, 2));
	return size ? 0 : text_add(t, "-", 1);
}

static int say_number(struct text *t, struct avp *avp)
{
	uint32_t number;

	return u32_of(avp, &number) ? text_print(t, " %" PRIu32, number) : text_add(t, " -", 2);
}

/* One word whatever the octets are. */
static int say_word(struct text *t, struct avp *avp)
{
	size_t size, i;
	const uint8_t *data = octets(avp, &size);

	CHECK_FCT(text_add(t, size ? " " : " -", size ? 1 : 2));
	for (i = 0; i < size; i++)
		CHECK_FCT(text_add(t, data[i] > ' ' && data[i] < 0x7f ? (const char *)&data[i] : "?", 1));
	return 0;
}

static int say_vectors(struct text *t, struct avp *info)
{
	static const struct {
		enum avp_id group;
		const char *before;
		enum avp_id parts[5];
		int count;
	} kinds[] = {
		{ A_EUTRAN_VECTOR, " ", { A_RAND, A_XRES, A_AUTN, A_KASME }, 4 },
		{ A_UTRAN_VECTOR, " u:", { A_RAND, A_XRES, A_AUTN, A_CONFIDENTIALITY_KEY, A_INTEGRITY_KEY }, 5 },
		{ A_GERAN_VECTOR, " g:", { A_RAND, A_SRES, A_KC }, 3 },
	};
	struct avp *v;
	int k, i;

	for (k = 0; k < 3; k++)
		for (v = child(info, kinds[k].group); v; v = next(v, kinds[k].group))
			for (i = 0; i < kinds[k].count; i++)
				CHECK_FCT(say_hex(t, i ? ":" : kinds[k].before, child(v, kinds[k].parts[i])));
	return 0;
}

/* What Open5GS's MME drops beyond the grammar (mme_s6a_aia_cb and mme_s6a_ula_cb). */
static const char *unusable(struct msg *m, uint32_t command)
{
	struct msg *request = NULL;

	if (result_of(m) != SUCCESS || fd_msg_answ_getq(m, &request))
		return NULL;
	if (command == CMD_AIR && child(request, A_REQUESTED_EUTRAN) &&
	    !child(child(m, A_AUTHENTICATION_INFO), A_EUTRAN_VECTOR))
		return "no E-UTRAN-Vector";
	if (command == CMD_ULR && !child(m, A_ULA_FLAGS))
		return "no ULA-Flags";
	if (command == CMD_ULR && !child(m, A_SUBSCRIPTION_DATA) && !child(m, A_BINDING_ANSWER))
		return "no Subscription-Data";
	return NULL;
}

int mme_answer(struct text *t, const char *id, struct msg *m)
{
	struct avp *a = child(m, A_BINDING_ANSWER);
	const char *why = tgpp_fault(m);
	struct msg_hdr *h;

	CHECK_FCT(fd_msg_hdr(m, &h));
	if (!why)
		why = unusable(m, h->msg_code);
	if (why)
		return text_print(t, "ERR %s dropped %s (result %" PRIu32 ")", id, why, result_of(m));
	switch (h->msg_code) {
	case CMD_AIR:
		CHECK_FCT(text_print(t, "AIA %s %" PRIu32, id, result_of(m)));
		CHECK_FCT(say_number(t, child(m, A_BINDING_CONTROL)));
		CHECK_FCT(say_word(t, child(m, A_BINDING_ATTEMPT)));
		for (a = child(m, A_AUTHENTICATION_INFO); a; a = next(a, A_AUTHENTICATION_INFO))
			CHECK_FCT(say_vectors(t, a));
		return 0;
	case CMD_ULR:
		CHECK_FCT(text_print(t, "ULA %s %" PRIu32, id, result_of(m)));
		CHECK_FCT(say_number(t, child(a, A_BINDING_STATUS)));
		CHECK_FCT(say_hex(t, " ", child(a, A_NW_SIG)));
		return text_print(t, " %s", child(m, A_SUBSCRIPTION_DATA) ? "data" : "-");
	default:
		CHECK_FCT(text_print(t, "MAA %s %" PRIu32, id, result_of(m)));
		for (a = child(m, A_SIP_AUTH_DATA_ITEM); a; a = next(a, A_SIP_AUTH_DATA_ITEM))
			CHECK_FCT(say_hex(t, " ", child(a, A_SIP_AUTHENTICATE)));
		return 0;
	}
}

/* Requests */

static int number(const char *word, int base, uint64_t max, uint64_t *out)
{
	const char *digits = base == 16 ? "0123456789abcdefABCDEF" : "0123456789";
	char *end;

	if (!*word || word[strspn(word, digits)])
		return EINVAL;
	errno = 0;
	*out = strtoull(word, &end, base);
	return errno || *end || *out > max ? EINVAL : 0;
}

static int digits(const char *word, size_t min, size_t max)
{
	size_t len = strspn(word, "0123456789");

	return len >= min && len <= max && !word[len];
}

static int read_options(char **w, int n, struct options *o)
{
	*o = (struct options){ .plmn = "00101" };
	for (; n; w++, n--) {
		if (!strncmp(*w, "host=", 5))
			o->host = *w + 5;
		else if (!strncmp(*w, "realm=", 6))
			o->realm = *w + 6;
		else if (!strncmp(*w, "plmn=", 5) && digits(*w + 5, 5, 6))
			o->plmn = *w + 5;
		else if (!strcmp(*w, "plain"))
			o->plain = 1;
		else if (!strncmp(*w, "uresync=", 8))
			o->uresync = *w + 8;
		else if (strncmp(*w, "utran=", 6) || number(*w + 6, 10, UINT32_MAX, &o->utran))
			return EINVAL;
	}
	return 0;
}

static int add_origin(struct msg *msg, const struct options *o)
{
	const char *host = o->host ? o->host : fd_g_config->cnf_diamid;
	const char *realm = o->realm ? o->realm : fd_g_config->cnf_diamrlm;

	CHECK_FCT(add_octets(msg, A_ORIGIN_HOST, host, strlen(host)));
	return add_octets(msg, A_ORIGIN_REALM, realm, strlen(realm));
}

static int add_features(struct msg *msg)
{
	struct avp *group;

	CHECK_FCT(add_group(msg, A_SUPPORTED_FEATURES, &group));
	CHECK_FCT(add_u32(group, A_VENDOR_ID, VENDOR_OWN));
	CHECK_FCT(add_u32(group, A_FEATURE_LIST_ID, 1));
	return add_u32(group, A_FEATURE_LIST, 1);
}

/* TS 29.272, 7.3.9: as in TS 24.008 */
static int add_plmn(struct msg *msg, const char *p)
{
	const uint8_t third = p[5] ? (uint8_t)(p[5] - '0') : 0xf;
	const uint8_t plmn[3] = { (uint8_t)((p[1] - '0') << 4 | (p[0] - '0')), (uint8_t)(third << 4 | (p[2] - '0')),
				  (uint8_t)((p[4] - '0') << 4 | (p[3] - '0')) };

	return add_octets(msg, A_VISITED_PLMN_ID, plmn, sizeof(plmn));
}

static int add_common(struct msg *msg, enum app app, const char *user, const char *realm, const struct options *o)
{
	struct avp *group;

	CHECK_FCT(fd_msg_new_session(msg, NULL, 0));
	CHECK_FCT(add_group(msg, A_VENDOR_SPECIFIC, &group));
	CHECK_FCT(add_u32(group, A_VENDOR_ID, VENDOR_3GPP));
	CHECK_FCT(add_u32(group, A_AUTH_APPLICATION_ID, tgpp_app_ids[app]));
	CHECK_FCT(add_u32(msg, A_AUTH_SESSION_STATE, 1));
	CHECK_FCT(add_origin(msg, o));
	CHECK_FCT(add_octets(msg, A_DESTINATION_REALM, realm, strlen(realm)));
	CHECK_FCT(add_octets(msg, A_USER_NAME, user, strlen(user)));
	return o->plain ? 0 : add_features(msg);
}

static int add_wanted(struct msg *msg, enum avp_id id, uint32_t vectors, const char *resync, size_t resync_size)
{
	struct avp *group;

	CHECK_FCT(add_group(msg, id, &group));
	CHECK_FCT(add_u32(group, A_NUMBER_OF_VECTORS, vectors));
	return resync_size ? add_octets(group, A_RESYNC_INFO, resync, resync_size) : 0;
}

static int fill_air(struct msg *msg, char **w, const char *realm, const struct options *o)
{
	uint64_t vectors;
	size_t size, usize = 0;

	if (number(w[1], 10, UINT32_MAX, &vectors) || unhex(w[2], &size) || (o->uresync && unhex(o->uresync, &usize)))
		return EINVAL;
	CHECK_FCT(add_common(msg, S6A, w[0], realm, o));
	CHECK_FCT(add_plmn(msg, o->plmn));
	if (vectors || size)
		CHECK_FCT(add_wanted(msg, A_REQUESTED_EUTRAN, (uint32_t)vectors, w[2], size));
	return o->utran ? add_wanted(msg, A_REQUESTED_UTRAN_GERAN, (uint32_t)o->utran, o->uresync, usize) : 0;
}

static int fill_ulr(struct msg *msg, char **w, const char *realm, const struct options *o)
{
	struct avp *group;
	size_t size;

	if (!digits(w[1], 1, 16) || unhex(w[2], &size))
		return EINVAL;
	CHECK_FCT(add_common(msg, S6A, w[0], realm, o));
	CHECK_FCT(add_plmn(msg, o->plmn));
	CHECK_FCT(add_u32(msg, A_RAT_TYPE, RAT_EUTRAN));
	CHECK_FCT(add_u32(msg, A_ULR_FLAGS, ULR_FLAGS));
	CHECK_FCT(add_group(msg, A_TERMINAL_INFORMATION, &group));
	CHECK_FCT(add_octets(group, A_IMEI, w[1], strlen(w[1])));
	CHECK_FCT(add_octets(group, A_SOFTWARE_VERSION, "01", 2));
	if (!size)
		return 0;
	CHECK_FCT(add_group(msg, A_BINDING_REQUEST, &group));
	CHECK_FCT(add_octets(group, A_BINDING_PAYLOAD, w[2], size));
	return strcmp(w[3], "-") ? add_octets(group, A_BINDING_ATTEMPT, w[3], strlen(w[3])) : 0;
}

static int fill_mar(struct msg *msg, char **w, const char *realm, const struct options *o)
{
	static const char *const apps[APPS] = { "s6a", "cx", "swx", "zh", "wx" }, scheme[] = "Digest-AKAv1-MD5";
	struct msg_hdr *h;
	struct avp *group;
	uint64_t items;
	size_t size;
	int app;

	for (app = CX; app < APPS && strcmp(apps[app], w[0]); app++)
		;
	if (app == APPS || number(w[2], 10, UINT32_MAX, &items) || unhex(w[3], &size))
		return EINVAL;
	CHECK_FCT(fd_msg_hdr(msg, &h));
	h->msg_appl = tgpp_app_ids[app];
	CHECK_FCT(add_common(msg, (enum app)app, w[1], realm, o));
	CHECK_FCT(add_u32(msg, A_SIP_NUMBER_AUTH_ITEMS, (uint32_t)items));
	CHECK_FCT(add_group(msg, A_SIP_AUTH_DATA_ITEM, &group));
	CHECK_FCT(add_octets(group, A_SIP_AUTHENTICATION_SCHEME, scheme, sizeof(scheme) - 1));
	return size ? add_octets(group, A_SIP_AUTHORIZATION, w[3], size) : 0;
}

/*
 * The library reads and writes back a list of AVPs by these lengths without looking inside them, and is not safe
 * against lengths below a header's.
 */
static int raw_list_ok(const uint8_t *p, size_t size)
{
	while (size) {
		size_t head, len;

		if (size < 8)
			return 0;
		head = p[4] & AVP_FLAG_VENDOR ? 12 : 8;
		len = (size_t)p[5] << 16 | (size_t)p[6] << 8 | p[7];
		if (len < head || len > size)
			return 0;
		len = (len + 3) & ~(size_t)3;
		if (len >= size)
			return 1;
		p += len;
		size -= len;
	}
	return 1;
}

/* Makes *msg anew from its octets and the raw ones: those stay unparsed. */
static int append_raw(struct msg **msg, const char *raw, size_t size)
{
	size_t head, total;
	uint8_t *buf = NULL, *more;
	struct msg *joined;

	CHECK_FCT(fd_msg_bufferize(*msg, &buf, &head));
	total = head + ((size + 3) & ~(size_t)3);
	more = realloc(buf, total);
	if (!more) {
		free(buf);
		return ENOMEM;
	}
	buf = more;
	memset(buf + head, 0, total - head);
	memcpy(buf + head, raw, size);
	buf[1] = (uint8_t)(total >> 16);
	buf[2] = (uint8_t)(total >> 8);
	buf[3] = (uint8_t)total;
	if (fd_msg_parse_buffer(&buf, total, &joined)) {
		free(buf);
		return EBADMSG;
	}
	fd_msg_free(*msg);
	*msg = joined;
	return 0;
}

static const char *raw_request(char **w, const char *realm, struct msg **msg)
{
	static const struct options none;
	struct msg_hdr *h;
	uint64_t code, flags;
	size_t size;

	if (number(w[0], 10, UINT32_MAX, &code) || number(w[1], 16, 0xff, &flags) || unhex(w[2], &size))
		return "malformed";
	if (code != CMD_AIR && code != CMD_ULR)
		return "bad-code";
	if (!(flags & CMD_FLAG_REQUEST))
		return "bad-flags";
	if (!raw_list_ok((uint8_t *)w[2], size))
		return "bad-avps";
	if (fd_msg_new(tgpp_commands[code == CMD_AIR ? AIR : ULR], MSGFL_ALLOC_ETEID, msg) ||
	    fd_msg_new_session(*msg, NULL, 0) || add_origin(*msg, &none) ||
	    add_octets(*msg, A_DESTINATION_REALM, realm, strlen(realm)) || fd_msg_hdr(*msg, &h))
		return "cannot-build";
	h->msg_flags = (uint8_t)flags;
	return append_raw(msg, w[2], size) ? "cannot-build" : NULL;
}

const char *mme_request(char **w, int n, const char *realm, struct msg **msg)
{
	static const struct {
		const char *name;
		int words;
		enum command command;
		int (*fill)(struct msg *msg, char **w, const char *realm, const struct options *o);
	} verbs[] = { { "AIR", 3, AIR, fill_air }, { "ULR", 4, ULR, fill_ulr }, { "MAR", 4, MAR, fill_mar } };
	struct options o;
	size_t i;
	int err;

	*msg = NULL;
	if (n == 5 && !strcmp(w[0], "RAW"))
		return raw_request(w + 2, realm, msg);
	for (i = 0; i < sizeof(verbs) / sizeof(*verbs); i++) {
		if (strcmp(w[0], verbs[i].name))
			continue;
		if (n < 2 + verbs[i].words || read_options(w + 2 + verbs[i].words, n - 2 - verbs[i].words, &o) ||
		    (verbs[i].command != MAR && !digits(w[2], 1, 15)))
			return "malformed";
		if (fd_msg_new(tgpp_commands[verbs[i].command], MSGFL_ALLOC_ETEID, msg))
			return "cannot-build";
		err = verbs[i].fill(*msg, w + 2, realm, &o);
		return err == EINVAL ? "malformed" : err ? "cannot-build" : NULL;
	}
	return "malformed";
}
