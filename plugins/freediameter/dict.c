/* SPDX-License-Identifier: Apache-2.0 */
#include "dict.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

uint32_t own_vendor_id = VENDOR_OWN;

struct dict_object *a_auth_application_id, *a_vendor_specific_application_id, *a_vendor_id, *a_auth_session_state,
	*a_proxy_state, *a_proxy_host, *a_proxy_info, *a_experimental_result, *a_experimental_result_code,
	*a_supported_features, *a_feature_list_id, *a_feature_list, *a_binding_answer, *a_nw_sig, *a_binding_status,
	*a_binding_control, *a_binding_attempt, *a_equipment_status;

#define OCTETS	AVP_TYPE_OCTETSTRING
#define GROUP	AVP_TYPE_GROUPED
#define U32	AVP_TYPE_UNSIGNED32
#define V	AVP_FLAG_VENDOR
#define VM	(AVP_FLAG_VENDOR | AVP_FLAG_MANDATORY)

struct wanted {
	uint32_t code;
	const char *name;
	uint8_t flags;
	enum dict_avp_basetype type;
	struct dict_object **out;	/* NULL: it is only read */
};

/* M clear: a node that lacks them must ignore them (RFC 6733, 4.1). */
static const struct wanted own[] = {
	{ OWN_BINDING_REQUEST, "Binding-Request", V, GROUP, NULL },
	{ OWN_BINDING_PAYLOAD, "Binding-Payload", V, OCTETS, NULL },
	{ OWN_BINDING_ATTEMPT, "Binding-Attempt", V, OCTETS, &a_binding_attempt },
	{ OWN_BINDING_ANSWER, "Binding-Answer", V, GROUP, &a_binding_answer },
	{ OWN_NW_SIG, "NW-Sig", V, OCTETS, &a_nw_sig },
	{ OWN_BINDING_STATUS, "Binding-Status", V, U32, &a_binding_status },
	{ OWN_BINDING_CONTROL, "Binding-Control", V, U32, &a_binding_control },
};

/* The base protocol's: the core makes them. */
static const struct wanted base[] = {
	{ BASE_USER_NAME, "User-Name", 0, OCTETS, NULL },
	{ BASE_PROXY_STATE, "Proxy-State", 0, OCTETS, &a_proxy_state },
	{ BASE_AUTH_APPLICATION_ID, "Auth-Application-Id", 0, U32, &a_auth_application_id },
	{ BASE_VENDOR_SPECIFIC_APPLICATION_ID, "Vendor-Specific-Application-Id", 0, GROUP,
	  &a_vendor_specific_application_id },
	{ BASE_ORIGIN_HOST, "Origin-Host", 0, OCTETS, NULL },
	{ BASE_VENDOR_ID, "Vendor-Id", 0, U32, &a_vendor_id },
	{ BASE_RESULT_CODE, "Result-Code", 0, U32, NULL },
	{ BASE_AUTH_SESSION_STATE, "Auth-Session-State", 0, U32, &a_auth_session_state },
	{ BASE_PROXY_HOST, "Proxy-Host", 0, OCTETS, &a_proxy_host },
	{ BASE_PROXY_INFO, "Proxy-Info", 0, GROUP, &a_proxy_info },
	{ BASE_ORIGIN_REALM, "Origin-Realm", 0, OCTETS, NULL },
	{ BASE_EXPERIMENTAL_RESULT, "Experimental-Result", 0, GROUP, &a_experimental_result },
	{ BASE_EXPERIMENTAL_RESULT_CODE, "Experimental-Result-Code", 0, U32, &a_experimental_result_code },
};

static const struct wanted tgpp[] = {
	{ TGPP_SIP_AUTHENTICATE, "SIP-Authenticate", VM, OCTETS, NULL },
	{ TGPP_SIP_AUTHORIZATION, "SIP-Authorization", VM, OCTETS, NULL },
	{ TGPP_SIP_AUTH_DATA_ITEM, "SIP-Auth-Data-Item", VM, GROUP, NULL },
	{ TGPP_SUPPORTED_FEATURES, "Supported-Features", V, GROUP, &a_supported_features },
	{ TGPP_FEATURE_LIST_ID, "Feature-List-ID", V, U32, &a_feature_list_id },
	{ TGPP_FEATURE_LIST, "Feature-List", V, U32, &a_feature_list },
	{ TGPP_SUBSCRIPTION_DATA, "Subscription-Data", VM, GROUP, NULL },
	{ TGPP_TERMINAL_INFORMATION, "Terminal-Information", VM, GROUP, NULL },
	{ TGPP_IMEI, "IMEI", VM, OCTETS, NULL },
	{ TGPP_SOFTWARE_VERSION, "Software-Version", VM, OCTETS, NULL },	/* an unknown one with M is refused */
	{ TGPP_VISITED_PLMN_ID, "Visited-PLMN-Id", VM, OCTETS, NULL },
	{ TGPP_REQUESTED_EUTRAN, "Requested-EUTRAN-Authentication-Info", VM, GROUP, NULL },
	{ TGPP_REQUESTED_UTRAN_GERAN, "Requested-UTRAN-GERAN-Authentication-Info", VM, GROUP, NULL },
	{ TGPP_RESYNC_INFO, "Re-Synchronization-Info", VM, OCTETS, NULL },
	{ TGPP_AUTHENTICATION_INFO, "Authentication-Info", VM, GROUP, NULL },
	{ TGPP_EUTRAN_VECTOR, "E-UTRAN-Vector", VM, GROUP, NULL },
	{ TGPP_UTRAN_VECTOR, "UTRAN-Vector", VM, GROUP, NULL },
	{ TGPP_GERAN_VECTOR, "GERAN-Vector", VM, GROUP, NULL },
	{ TGPP_EQUIPMENT_STATUS, "Equipment-Status", VM, U32, &a_equipment_status },
	{ TGPP_RAND, "RAND", VM, OCTETS, NULL },
	{ TGPP_3GPP2_MEID, "3GPP2-MEID", VM, OCTETS, NULL },
};

#define EACH(list)	list, sizeof(list) / sizeof(*(list))

static int type_fits(enum dict_avp_basetype have, enum dict_avp_basetype want)
{
	/* Enumerated is Integer32 to the library; both are 4 octets. */
	return have == want || (want == U32 && have == AVP_TYPE_INTEGER32);
}

static int make_vendor(uint32_t id, const char *name)
{
	struct dict_object *there;
	struct dict_vendor_data data = { id, (char *)name };

	CHECK_FCT(fd_dict_search(fd_g_config->cnf_dict, DICT_VENDOR, VENDOR_BY_ID, &id, &there, 0));
	return there ? 0 : fd_dict_new(fd_g_config->cnf_dict, DICT_VENDOR, &data, NULL, NULL);
}

static int find(uint32_t vendor, uint32_t code, struct dict_object **out)
{
	struct dict_avp_request_ex by_vendor;
	avp_code_t cc = code;

	if (!vendor)
		return fd_dict_search(fd_g_config->cnf_dict, DICT_AVP, AVP_BY_CODE, &cc, out, 0);
	memset(&by_vendor, 0, sizeof(by_vendor));
	by_vendor.avp_vendor.vendor_id = vendor;
	by_vendor.avp_data.avp_code = code;
	return fd_dict_search(fd_g_config->cnf_dict, DICT_AVP, AVP_BY_STRUCT, &by_vendor, out, 0);
}

static int make_avps(uint32_t vendor, const struct wanted *w, size_t count)
{
	struct dict_avp_data data;
	struct dict_object *there;

	for (; count--; w++) {
		CHECK_FCT(find(vendor, w->code, &there));
		memset(&data, 0, sizeof(data));
		if (there) {
			CHECK_FCT(fd_dict_getval(there, &data));
			if (!type_fits(data.avp_basetype, w->type)) {
				LOG_E("kme: the host's dictionary has AVP %u of vendor %u (%s) with base type %d, and "
				      "%d is needed: correct the dictionary", w->code, vendor, data.avp_name,
				      (int)data.avp_basetype, (int)w->type);
				return EINVAL;
			}
		} else {
			data.avp_code = w->code;
			data.avp_vendor = vendor;
			data.avp_name = (char *)w->name;
			data.avp_flag_mask = VM;
			data.avp_flag_val = w->flags;
			data.avp_basetype = w->type;
			CHECK_FCT(fd_dict_new(fd_g_config->cnf_dict, DICT_AVP, &data, NULL, &there));
		}
		if (w->out)
			*w->out = there;
	}
	return 0;
}

/* A request and its answer, whose model our refusals use. */
static int make_command(uint32_t code, const char *request, const char *answer)
{
	struct dict_cmd_data data = {
		.cmd_code = code, .cmd_flag_mask = CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE | CMD_FLAG_ERROR,
	};
	struct dict_object *there;
	command_code_t cc = code;

	CHECK_FCT(fd_dict_search(fd_g_config->cnf_dict, DICT_COMMAND, CMD_BY_CODE_R, &cc, &there, 0));
	data.cmd_name = (char *)request;
	data.cmd_flag_val = CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE;
	if (!there)
		CHECK_FCT(fd_dict_new(fd_g_config->cnf_dict, DICT_COMMAND, &data, NULL, NULL));
	CHECK_FCT(fd_dict_search(fd_g_config->cnf_dict, DICT_COMMAND, CMD_BY_CODE_A, &cc, &there, 0));
	data.cmd_name = (char *)answer;
	data.cmd_flag_mask &= ~CMD_FLAG_ERROR;	/* an answer may have it */
	data.cmd_flag_val = CMD_FLAG_PROXIABLE;
	return there ? 0 : fd_dict_new(fd_g_config->cnf_dict, DICT_COMMAND, &data, NULL, NULL);
}

static int make_all(void)
{
	CHECK_FCT(make_avps(0, EACH(base)));
	CHECK_FCT(make_vendor(VENDOR_3GPP, "3GPP"));
	CHECK_FCT(make_avps(VENDOR_3GPP, EACH(tgpp)));
	CHECK_FCT(make_command(CMD_AIR, "Authentication-Information-Request", "Authentication-Information-Answer"));
	CHECK_FCT(make_command(CMD_ULR, "Update-Location-Request", "Update-Location-Answer"));
	CHECK_FCT(make_command(CMD_ECR, "ME-Identity-Check-Request", "ME-Identity-Check-Answer"));
	return make_command(CMD_MAR, "3GPP/Multimedia-Auth-Request", "3GPP/Multimedia-Auth-Answer");
}

static int made = EAGAIN;

static void make_once(void)
{
	made = make_all();
	if (made)
		LOG_E("kme: the dictionary cannot be used (%s): every request is refused", strerror(made));
}

int dict_ready(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, make_once);
	return made;
}

int dict_own(uint32_t own_vendor)
{
	own_vendor_id = own_vendor;
	CHECK_FCT(make_vendor(own_vendor, "KME binding"));
	return make_avps(own_vendor, EACH(own));
}

static int add_value(msg_or_avp *parent, struct dict_object *model, union avp_value *value)
{
	struct avp *avp;
	int err;

	CHECK_FCT(fd_msg_avp_new(model, 0, &avp));
	err = fd_msg_avp_setvalue(avp, value);
	if (!err)
		err = fd_msg_avp_add(parent, MSG_BRW_LAST_CHILD, avp);
	if (err)
		fd_msg_free(avp);
	return err;
}

int add_octets(msg_or_avp *parent, struct dict_object *model, const void *data, size_t size)
{
	union avp_value value = { .os = { .data = (uint8_t *)data, .len = size } };	/* the library copies it */

	return add_value(parent, model, &value);
}

int add_u32(msg_or_avp *parent, struct dict_object *model, uint32_t number)
{
	union avp_value value = { .u32 = number };

	return add_value(parent, model, &value);
}

int add_group(msg_or_avp *parent, struct dict_object *model, struct avp **out)
{
	int err;

	CHECK_FCT(fd_msg_avp_new(model, 0, out));
	err = fd_msg_avp_add(parent, MSG_BRW_LAST_CHILD, *out);
	if (err)
		fd_msg_free(*out);
	return err;
}

static int is(struct avp *avp, uint32_t vendor, uint32_t code)
{
	struct avp_hdr *h;

	return !fd_msg_avp_hdr(avp, &h) && h->avp_code == code && ((h->avp_flags & V) ? h->avp_vendor : 0) == vendor;
}

struct avp *next(struct avp *avp, uint32_t vendor, uint32_t code)
{
	while (avp && !fd_msg_browse(avp, MSG_BRW_NEXT, &avp, NULL))
		if (avp && is(avp, vendor, code))
			return avp;
	return NULL;
}

struct avp *child(msg_or_avp *parent, uint32_t vendor, uint32_t code)
{
	struct avp *avp = NULL;

	if (!parent || fd_msg_browse(parent, MSG_BRW_FIRST_CHILD, &avp, NULL) || !avp)
		return NULL;
	return is(avp, vendor, code) ? avp : next(avp, vendor, code);
}

static int in(const struct wanted *w, size_t count, uint32_t code)
{
	for (; count--; w++)
		if (w->code == code && w->type == GROUP)
			return 1;
	return 0;
}

int is_group(uint32_t vendor, uint32_t code)
{
	return vendor == own_vendor_id ? in(EACH(own), code) : vendor == VENDOR_3GPP ? in(EACH(tgpp), code) :
	       !vendor ? in(EACH(base), code) : 0;
}

static union avp_value *value_of(struct avp *avp, enum dict_avp_basetype type)
{
	struct dict_object *model = NULL;
	struct dict_avp_data data;
	struct avp_hdr *h;

	if (!avp || fd_msg_avp_hdr(avp, &h) || !h->avp_value || fd_msg_model(avp, &model) || !model ||
	    fd_dict_getval(model, &data))
		return NULL;
	return type_fits(data.avp_basetype, type) ? h->avp_value : NULL;
}

uint8_t *octets(struct avp *avp, size_t *size)
{
	union avp_value *v = value_of(avp, OCTETS);

	*size = v ? v->os.len : 0;
	return v ? v->os.data : NULL;
}

int u32_of(struct avp *avp, uint32_t *out)
{
	union avp_value *v = value_of(avp, U32);

	if (v)
		*out = v->u32;
	return v != NULL;
}
