/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of S6a (3GPP TS 29.272) and of our own AVPs that the extensions
 * touch. The host may have S6a dictionaries of its own, loaded before or not
 * at all, so each object is looked up by number first: names differ between
 * dictionaries.
 */
#ifndef S6A_DICT_H
#define S6A_DICT_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <freeDiameter/extension.h>

#define S6A_APP		16777251u
#define VENDOR_3GPP	10415u
#define VENDOR_OWN	32473u	/* RFC 5612: reserved for examples */
#define CMD_ULR		316u
#define CMD_AIR		318u

#define AVP_MAYBE	__attribute__((unused))

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
	BASE_VENDOR_ID = 266,
	BASE_RESULT_CODE = 268,
	BASE_AUTH_SESSION_STATE = 277,
	BASE_DESTINATION_REALM = 283,
	BASE_DESTINATION_HOST = 293,
	BASE_EXPERIMENTAL_RESULT = 297,
	BASE_EXPERIMENTAL_RESULT_CODE = 298,
};

enum tgpp_code {
	TGPP_SUPPORTED_FEATURES = 628,
	TGPP_FEATURE_LIST_ID = 629,
	TGPP_FEATURE_LIST = 630,
	TGPP_RAT_TYPE = 1032,
	TGPP_TERMINAL_INFORMATION = 1401,
	TGPP_IMEI = 1402,
	TGPP_SOFTWARE_VERSION = 1403,
	TGPP_ULR_FLAGS = 1405,
	TGPP_ULA_FLAGS = 1406,
	TGPP_VISITED_PLMN_ID = 1407,
	TGPP_REQUESTED_EUTRAN = 1408,
	TGPP_NUMBER_OF_VECTORS = 1410,
	TGPP_RESYNC_INFO = 1411,
	TGPP_AUTHENTICATION_INFO = 1413,
	TGPP_EUTRAN_VECTOR = 1414,
	TGPP_RAND = 1447,
	TGPP_XRES = 1448,
	TGPP_AUTN = 1449,
	TGPP_KASME = 1450,
};

static uint32_t own_vendor_id;
static AVP_MAYBE struct dict_object *d_app, *d_3gpp, *d_own;
static AVP_MAYBE struct dict_object *d_air, *d_aia, *d_ulr, *d_ula;

static AVP_MAYBE struct dict_object *a_user_name, *a_vendor_id, *a_result_code,
	*a_auth_session_state, *a_destination_realm, *a_destination_host,
	*a_experimental_result, *a_experimental_result_code;
static AVP_MAYBE struct dict_object *a_supported_features, *a_feature_list_id,
	*a_feature_list, *a_rat_type, *a_terminal_information, *a_imei,
	*a_software_version, *a_ulr_flags, *a_ula_flags, *a_visited_plmn_id,
	*a_requested_eutran, *a_number_of_vectors, *a_resync_info,
	*a_authentication_info, *a_eutran_vector, *a_rand, *a_xres, *a_autn,
	*a_kasme;
static AVP_MAYBE struct dict_object *a_binding_request, *a_binding_payload,
	*a_binding_attempt, *a_binding_answer, *a_nw_sig, *a_binding_status,
	*a_binding_control;

struct avp_want {
	uint32_t code;
	const char *name;
	uint8_t flags;
	enum dict_avp_basetype type;
	struct dict_object **out;
};

static int dict_vendor(uint32_t id, const char *name, struct dict_object **out)
{
	struct dictionary *dict = fd_g_config->cnf_dict;
	struct dict_vendor_data data = { id, (char *)name };

	CHECK_FCT(fd_dict_search(dict, DICT_VENDOR, VENDOR_BY_ID, &id, out, 0));
	if (*out)
		return 0;
	return fd_dict_new(dict, DICT_VENDOR, &data, NULL, out);
}

static int dict_app(void)
{
	struct dictionary *dict = fd_g_config->cnf_dict;
	application_id_t id = S6A_APP;
	struct dict_application_data data = { S6A_APP, "S6A" };

	CHECK_FCT(fd_dict_search(dict, DICT_APPLICATION, APPLICATION_BY_ID, &id,
				 &d_app, 0));
	if (d_app)
		return 0;
	return fd_dict_new(dict, DICT_APPLICATION, &data, d_3gpp, &d_app);
}

static int dict_cmd(uint32_t code, const char *name, int request,
		    struct dict_object **out)
{
	struct dictionary *dict = fd_g_config->cnf_dict;
	command_code_t cc = code;
	struct dict_cmd_data data = {
		.cmd_code = code,
		.cmd_name = (char *)name,
		.cmd_flag_mask = CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE,
		.cmd_flag_val = CMD_FLAG_PROXIABLE,
	};

	CHECK_FCT(fd_dict_search(dict, DICT_COMMAND,
				 request ? CMD_BY_CODE_R : CMD_BY_CODE_A,
				 &cc, out, 0));
	if (*out)
		return 0;
	if (request) {
		/* only an answer may carry the E bit (RFC 6733, 3) */
		data.cmd_flag_mask |= CMD_FLAG_ERROR;
		data.cmd_flag_val |= CMD_FLAG_REQUEST;
	}
	return fd_dict_new(dict, DICT_COMMAND, &data, d_app, out);
}

static int dict_find(uint32_t vendor, uint32_t code, struct dict_object **out)
{
	struct dictionary *dict = fd_g_config->cnf_dict;
	struct dict_avp_request_ex rq;
	avp_code_t cc = code;

	if (!vendor)
		return fd_dict_search(dict, DICT_AVP, AVP_BY_CODE, &cc, out, 0);
	memset(&rq, 0, sizeof(rq));
	rq.avp_vendor.vendor_id = vendor;
	rq.avp_data.avp_code = code;
	return fd_dict_search(dict, DICT_AVP, AVP_BY_STRUCT, &rq, out, 0);
}

static int dict_type_fits(enum dict_avp_basetype have,
			  enum dict_avp_basetype want)
{
	/* Enumerated is Integer32 to the library; both are 4 octets */
	if (want == AVP_TYPE_UNSIGNED32 && have == AVP_TYPE_INTEGER32)
		return 1;
	return have == want;
}

static int dict_avp(uint32_t vendor, const struct avp_want *w)
{
	struct dict_avp_data data;

	CHECK_FCT(dict_find(vendor, w->code, w->out));
	if (*w->out) {
		CHECK_FCT(fd_dict_getval(*w->out, &data));
		if (dict_type_fits(data.avp_basetype, w->type))
			return 0;
		LOG_E("dictionary: AVP %u of vendor %u (%s) has base type %d, need %d",
		      w->code, vendor, data.avp_name, (int)data.avp_basetype,
		      (int)w->type);
		return EINVAL;
	}
	memset(&data, 0, sizeof(data));
	data.avp_code = w->code;
	data.avp_vendor = vendor;
	data.avp_name = (char *)w->name;
	data.avp_flag_mask = AVP_FLAG_VENDOR | AVP_FLAG_MANDATORY;
	data.avp_flag_val = w->flags;
	data.avp_basetype = w->type;
	return fd_dict_new(fd_g_config->cnf_dict, DICT_AVP, &data, NULL, w->out);
}

static int dict_avps(uint32_t vendor, const struct avp_want *w, size_t count)
{
	size_t i;

	for (i = 0; i < count; i++)
		CHECK_FCT(dict_avp(vendor, &w[i]));
	return 0;
}

#define DICT_AVPS(vendor, list) \
	dict_avps(vendor, list, sizeof(list) / sizeof((list)[0]))
#define F_M	AVP_FLAG_MANDATORY
#define F_V	AVP_FLAG_VENDOR
#define F_VM	(AVP_FLAG_VENDOR | AVP_FLAG_MANDATORY)
#define OCTETS	AVP_TYPE_OCTETSTRING
#define GROUP	AVP_TYPE_GROUPED
#define U32	AVP_TYPE_UNSIGNED32

static int dict_base_avps(void)
{
	const struct avp_want list[] = {
		{ BASE_USER_NAME, "User-Name", F_M, OCTETS, &a_user_name },
		{ BASE_VENDOR_ID, "Vendor-Id", F_M, U32, &a_vendor_id },
		{ BASE_RESULT_CODE, "Result-Code", F_M, U32, &a_result_code },
		{ BASE_AUTH_SESSION_STATE, "Auth-Session-State", F_M, U32,
		  &a_auth_session_state },
		{ BASE_DESTINATION_REALM, "Destination-Realm", F_M, OCTETS,
		  &a_destination_realm },
		{ BASE_DESTINATION_HOST, "Destination-Host", F_M, OCTETS,
		  &a_destination_host },
		{ BASE_EXPERIMENTAL_RESULT, "Experimental-Result", F_M, GROUP,
		  &a_experimental_result },
		{ BASE_EXPERIMENTAL_RESULT_CODE, "Experimental-Result-Code",
		  F_M, U32, &a_experimental_result_code },
	};

	return DICT_AVPS(0, list);
}

static int dict_3gpp_avps(void)
{
	const struct avp_want list[] = {
		{ TGPP_SUPPORTED_FEATURES, "Supported-Features", F_V, GROUP,
		  &a_supported_features },
		{ TGPP_FEATURE_LIST_ID, "Feature-List-ID", F_V, U32,
		  &a_feature_list_id },
		{ TGPP_FEATURE_LIST, "Feature-List", F_V, U32,
		  &a_feature_list },
		{ TGPP_RAT_TYPE, "RAT-Type", F_VM, U32, &a_rat_type },
		{ TGPP_TERMINAL_INFORMATION, "Terminal-Information", F_VM,
		  GROUP, &a_terminal_information },
		{ TGPP_IMEI, "IMEI", F_VM, OCTETS, &a_imei },
		{ TGPP_SOFTWARE_VERSION, "Software-Version", F_VM, OCTETS,
		  &a_software_version },
		{ TGPP_ULR_FLAGS, "ULR-Flags", F_VM, U32, &a_ulr_flags },
		{ TGPP_ULA_FLAGS, "ULA-Flags", F_VM, U32, &a_ula_flags },
		{ TGPP_VISITED_PLMN_ID, "Visited-PLMN-Id", F_VM, OCTETS,
		  &a_visited_plmn_id },
		{ TGPP_REQUESTED_EUTRAN, "Requested-EUTRAN-Authentication-Info",
		  F_VM, GROUP, &a_requested_eutran },
		{ TGPP_NUMBER_OF_VECTORS, "Number-Of-Requested-Vectors", F_VM,
		  U32, &a_number_of_vectors },
		{ TGPP_RESYNC_INFO, "Re-Synchronization-Info", F_VM, OCTETS,
		  &a_resync_info },
		{ TGPP_AUTHENTICATION_INFO, "Authentication-Info", F_VM, GROUP,
		  &a_authentication_info },
		{ TGPP_EUTRAN_VECTOR, "E-UTRAN-Vector", F_VM, GROUP,
		  &a_eutran_vector },
		{ TGPP_RAND, "RAND", F_VM, OCTETS, &a_rand },
		{ TGPP_XRES, "XRES", F_VM, OCTETS, &a_xres },
		{ TGPP_AUTN, "AUTN", F_VM, OCTETS, &a_autn },
		{ TGPP_KASME, "KASME", F_VM, OCTETS, &a_kasme },
	};

	return DICT_AVPS(VENDOR_3GPP, list);
}

static int dict_own_avps(void)
{
	/* M clear: a node that lacks them must ignore them (RFC 6733, 4.1) */
	const struct avp_want list[] = {
		{ OWN_BINDING_REQUEST, "Binding-Request", F_V, GROUP,
		  &a_binding_request },
		{ OWN_BINDING_PAYLOAD, "Binding-Payload", F_V, OCTETS,
		  &a_binding_payload },
		{ OWN_BINDING_ATTEMPT, "Binding-Attempt", F_V, OCTETS,
		  &a_binding_attempt },
		{ OWN_BINDING_ANSWER, "Binding-Answer", F_V, GROUP,
		  &a_binding_answer },
		{ OWN_NW_SIG, "NW-Sig", F_V, OCTETS, &a_nw_sig },
		{ OWN_BINDING_STATUS, "Binding-Status", F_V, U32,
		  &a_binding_status },
		{ OWN_BINDING_CONTROL, "Binding-Control", F_V, U32,
		  &a_binding_control },
	};

	return DICT_AVPS(own_vendor_id, list);
}

#undef DICT_AVPS
#undef F_M
#undef F_V
#undef F_VM
#undef OCTETS
#undef GROUP
#undef U32

static AVP_MAYBE int s6a_dict(uint32_t own_vendor)
{
	own_vendor_id = own_vendor ? own_vendor : VENDOR_OWN;
	CHECK_FCT(dict_vendor(VENDOR_3GPP, "3GPP", &d_3gpp));
	CHECK_FCT(dict_vendor(own_vendor_id, "Binding", &d_own));
	CHECK_FCT(dict_app());
	CHECK_FCT(dict_cmd(CMD_AIR, "Authentication-Information-Request", 1,
			   &d_air));
	CHECK_FCT(dict_cmd(CMD_AIR, "Authentication-Information-Answer", 0,
			   &d_aia));
	CHECK_FCT(dict_cmd(CMD_ULR, "Update-Location-Request", 1, &d_ulr));
	CHECK_FCT(dict_cmd(CMD_ULR, "Update-Location-Answer", 0, &d_ula));
	CHECK_FCT(dict_base_avps());
	CHECK_FCT(dict_3gpp_avps());
	return dict_own_avps();
}

static AVP_MAYBE int add_value(msg_or_avp *parent, struct dict_object *model,
			       union avp_value *value)
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

static AVP_MAYBE int add_octets(msg_or_avp *parent, struct dict_object *model,
				const void *data, size_t size)
{
	union avp_value value;

	memset(&value, 0, sizeof(value));
	value.os.data = (uint8_t *)data;	/* the library copies it */
	value.os.len = size;
	return add_value(parent, model, &value);
}

static AVP_MAYBE int add_u32(msg_or_avp *parent, struct dict_object *model,
			     uint32_t number)
{
	union avp_value value;

	memset(&value, 0, sizeof(value));
	value.u32 = number;
	return add_value(parent, model, &value);
}

/* An empty group, already in its place: to be filled with add_*() */
static AVP_MAYBE int add_group(msg_or_avp *parent, struct dict_object *model,
			       struct avp **out)
{
	int err;

	CHECK_FCT(fd_msg_avp_new(model, 0, out));
	err = fd_msg_avp_add(parent, MSG_BRW_LAST_CHILD, *out);
	if (err) {
		fd_msg_free(*out);
		*out = NULL;
	}
	return err;
}

/* From the header alone, so that an unparsed AVP will do */
static AVP_MAYBE int avp_is(struct avp *avp, uint32_t vendor, uint32_t code)
{
	struct avp_hdr *h;

	if (fd_msg_avp_hdr(avp, &h) || h->avp_code != code)
		return 0;
	return ((h->avp_flags & AVP_FLAG_VENDOR) ? h->avp_vendor : 0) == vendor;
}

static AVP_MAYBE struct avp *next(struct avp *avp, uint32_t vendor,
				  uint32_t code)
{
	while (avp) {
		if (fd_msg_browse(avp, MSG_BRW_NEXT, &avp, NULL))
			return NULL;
		if (avp && avp_is(avp, vendor, code))
			return avp;
	}
	return NULL;
}

static AVP_MAYBE struct avp *child(msg_or_avp *parent, uint32_t vendor,
				   uint32_t code)
{
	struct avp *avp = NULL;

	if (!parent ||
	    fd_msg_browse(parent, MSG_BRW_FIRST_CHILD, &avp, NULL) || !avp)
		return NULL;
	return avp_is(avp, vendor, code) ? avp : next(avp, vendor, code);
}

static AVP_MAYBE union avp_value *value_of(struct avp *avp,
					   enum dict_avp_basetype type)
{
	struct dict_object *model = NULL;
	struct dict_avp_data data;
	struct avp_hdr *h;

	if (!avp || fd_msg_avp_hdr(avp, &h) || !h->avp_value)
		return NULL;
	if (fd_msg_model(avp, &model) || !model || fd_dict_getval(model, &data))
		return NULL;
	return dict_type_fits(data.avp_basetype, type) ? h->avp_value : NULL;
}

static AVP_MAYBE uint8_t *octets(struct avp *avp, size_t *size)
{
	union avp_value *v = value_of(avp, AVP_TYPE_OCTETSTRING);

	*size = v ? v->os.len : 0;
	return v ? v->os.data : NULL;
}

static AVP_MAYBE int u32_of(struct avp *avp, uint32_t *out)
{
	union avp_value *v = value_of(avp, AVP_TYPE_UNSIGNED32);

	if (!v)
		return 0;
	*out = v->u32;
	return 1;
}

#endif
