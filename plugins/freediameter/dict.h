/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of the dictionary that kme.fdx touches: our own AVPs, S6a and S13 (3GPP TS 29.272) and Multimedia-Auth of
 * SWx, Wx, Cx and Zh (TS 29.273, 29.234, 29.229, 29.109). A host may define these before us, after us or not at all,
 * and may end if an object exists with other flags. So we define only our own vendor's AVPs when we are loaded. The
 * others are looked up by number at the first message, and defined if they are still missing.
 */
#ifndef KME_DICT_H
#define KME_DICT_H

#include <stddef.h>
#include <stdint.h>
#include <freeDiameter/extension.h>

#define S6A_APP		16777251u
#define SWX_APP		16777265u
#define WX_APP		16777219u	/* SWx until Release 8 (TS 29.234) */
#define CX_APP		16777216u
#define ZH_APP		16777221u
#define S13_APP		16777252u
#define VENDOR_3GPP	10415u
#define VENDOR_OWN	32473u	/* RFC 5612: reserved for examples */
#define CMD_MAR		303u
#define CMD_ULR		316u
#define CMD_AIR		318u
#define CMD_ECR		324u

enum own_code {
	OWN_BINDING_REQUEST = 1,
	OWN_BINDING_PAYLOAD,
	OWN_BINDING_ATTEMPT,
	OWN_BINDING_ANSWER,
	OWN_NW_SIG,
	OWN_BINDING_STATUS,
	OWN_BINDING_CONTROL,
};

enum base_code {
	BASE_USER_NAME = 1,
	BASE_PROXY_STATE = 33,
	BASE_AUTH_APPLICATION_ID = 258,
	BASE_VENDOR_SPECIFIC_APPLICATION_ID = 260,
	BASE_SESSION_ID = 263,
	BASE_ORIGIN_HOST = 264,
	BASE_VENDOR_ID = 266,
	BASE_RESULT_CODE = 268,
	BASE_AUTH_SESSION_STATE = 277,
	BASE_PROXY_HOST = 280,
	BASE_PROXY_INFO = 284,
	BASE_ORIGIN_REALM = 296,
	BASE_EXPERIMENTAL_RESULT = 297,
	BASE_EXPERIMENTAL_RESULT_CODE = 298,
};

enum tgpp_code {
	TGPP_SIP_AUTHENTICATE = 609,
	TGPP_SIP_AUTHORIZATION = 610,
	TGPP_SIP_AUTH_DATA_ITEM = 612,
	TGPP_SUPPORTED_FEATURES = 628,
	TGPP_FEATURE_LIST_ID = 629,
	TGPP_FEATURE_LIST = 630,
	TGPP_SUBSCRIPTION_DATA = 1400,
	TGPP_TERMINAL_INFORMATION = 1401,
	TGPP_IMEI = 1402,
	TGPP_SOFTWARE_VERSION = 1403,
	TGPP_VISITED_PLMN_ID = 1407,
	TGPP_REQUESTED_EUTRAN = 1408,
	TGPP_REQUESTED_UTRAN_GERAN = 1409,
	TGPP_RESYNC_INFO = 1411,
	TGPP_AUTHENTICATION_INFO = 1413,
	TGPP_EUTRAN_VECTOR = 1414,
	TGPP_UTRAN_VECTOR = 1415,
	TGPP_GERAN_VECTOR = 1416,
	TGPP_EQUIPMENT_STATUS = 1445,
	TGPP_RAND = 1447,
	TGPP_3GPP2_MEID = 1471,
};

extern uint32_t own_vendor_id;

/* Flags of the AVPs that add_*() adds. */
extern struct dict_object *a_auth_application_id, *a_vendor_specific_application_id, *a_vendor_id,
	*a_auth_session_state, *a_proxy_state, *a_proxy_host, *a_proxy_info, *a_experimental_result,
	*a_experimental_result_code, *a_supported_features, *a_feature_list_id, *a_feature_list, *a_binding_answer,
	*a_nw_sig, *a_binding_status, *a_binding_control, *a_binding_attempt, *a_equipment_status;

int dict_own(uint32_t own_vendor);	/* when we are loaded */
int dict_ready(void);			/* 0: all objects are there; the first call finds out */

int add_octets(msg_or_avp *parent, struct dict_object *model, const void *data, size_t size);
int add_u32(msg_or_avp *parent, struct dict_object *model, uint32_t number);
int add_group(msg_or_avp *parent, struct dict_object *model, struct avp **out);	/* empty, and in its place */

/* By the header alone, so the AVP need not be parsed. NULL has no children. */
struct avp *child(msg_or_avp *parent, uint32_t vendor, uint32_t code);
struct avp *next(struct avp *avp, uint32_t vendor, uint32_t code);
int is_group(uint32_t vendor, uint32_t code);	/* a group whose AVPs we read */

/* NULL and 0 if there is no value of this type: the AVP must have been parsed. */
uint8_t *octets(struct avp *avp, size_t *size);
int u32_of(struct avp *avp, uint32_t *out);

#endif
