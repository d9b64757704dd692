/* SPDX-License-Identifier: Apache-2.0 */
/* S13: ME-Identity-Check (TS 29.272, 6) */
#include <string.h>

#include "procedure.h"

#define EQUIPMENT_UNKNOWN	5422

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

/* Lots have IMEIs only: a device with just a MEID is unknown. */
enum verdict identity_check(struct job *j)
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
		imei[14] = 0;	/* the spare digit, which replaces the check digit (TS 23.003, 6.2.1) */
	if (strlen(imei) < 14 || (!*j->imsi && child(j->msg, 0, BASE_USER_NAME)))
		return malformed(j, INVALID_AVP_VALUE);
	kme_ask_equipment(&j->call, imei, j->imsi);
	j->step = checked;
	return ASK;
}
