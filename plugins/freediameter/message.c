/* SPDX-License-Identifier: Apache-2.0 */
/* Messages of Diameter: parsing, and making answers. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "procedure.h"

#define NO_STATE_MAINTAINED	1

uint32_t command(struct msg *m)
{
	struct msg_hdr *h;

	return fd_msg_hdr(m, &h) ? 0 : h->msg_code;
}

uint32_t application(struct msg *m)
{
	struct msg_hdr *h;

	return fd_msg_hdr(m, &h) ? 0 : h->msg_appl;
}

/*
 * fd_msg_parse_dict() leaves a group half parsed if an AVP in it is damaged, and then the message is sent on truncated.
 * So we check forwarded messages before we parse them.
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

int message_well_formed(struct msg *m)
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

/* An AVP without data that the dictionary does not know cannot be sent any more after it was parsed. */
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

/* Parses an AVP and all AVPs in it, by the dictionary. If that fails, the message must not be sent on. */
int parse(struct avp *a)
{
	struct fd_pei pei;

	memset(&pei, 0, sizeof(pei));
	if (!fd_msg_parse_dict(a, fd_g_config->cnf_dict, &pei))
		return sendable(a);
	if (pei.pei_avp_free)
		fd_msg_free(pei.pei_avp);
	return 0;
}

/* On one way through them: a message has room for thousands. */
void drop_all(msg_or_avp *parent, uint32_t vendor, uint32_t code)
{
	struct avp *a, *more;

	for (a = child(parent, vendor, code); a; a = more) {
		more = next(a, vendor, code);
		if (fd_msg_free(a))
			return;
	}
}

int add_experimental(struct msg *m, uint32_t code)
{
	struct avp *group;

	CHECK_FCT(add_group(m, a_experimental_result, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, VENDOR_3GPP));
	return add_u32(group, a_experimental_result_code, code);
}

/* Whether an AVP of the base protocol has a value, or children, as the dictionary says. */
static int sound(struct avp *a)
{
	struct avp_hdr *h;

	return !fd_msg_avp_hdr(a, &h) && !(h->avp_flags & AVP_FLAG_VENDOR) && parse(a) &&
	       (h->avp_code == BASE_PROXY_INFO || h->avp_value);
}

/* freeDiameter 1.2.1 ends the process at a Session-Id with the V bit in a forwarded request. */
static void drop_unsound_session(struct msg *m)
{
	struct avp *a;

	while ((a = child(m, 0, BASE_SESSION_ID)) && !sound(a))
		if (fd_msg_free(a))
			return;
}

/* Copies the Proxy-Infos (RFC 6733, 6.2). The library's own function leaks if one is damaged. */
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
 * Makes the answer to a request: with a result of RFC 6733 by its name, or one of 3GPP's. It has all mandatory AVPs of
 * TS 29.272 and TS 29.229; an MME may drop an answer without one. The E bit is only for results 3xxx (RFC 6733, 7.2).
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
