/* SPDX-License-Identifier: Apache-2.0 */
#include "tgpp.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define M	AVP_FLAG_MANDATORY
#define V	AVP_FLAG_VENDOR
#define VM	(AVP_FLAG_VENDOR | AVP_FLAG_MANDATORY)
#define OCTETS	AVP_TYPE_OCTETSTRING
#define GROUP	AVP_TYPE_GROUPED
#define U32	AVP_TYPE_UNSIGNED32
#define I32	AVP_TYPE_INTEGER32	/* Enumerated */

#define MAX_RULES	192
#define MAX_DEPTH	8
#define IS_COMMAND	0x1000	/* a rule's parent: a command, not an AVP */

const uint32_t tgpp_app_ids[APPS] = { 16777251, 16777216, 16777265, 16777221, 16777219 };
struct dict_object *tgpp_apps[APPS], *tgpp_commands[COMMANDS], *tgpp_vendor;

static struct {
	uint32_t code, vendor;
	const char *name;
	uint8_t flags;
	enum dict_avp_basetype type;
	struct dict_object *model;
} avps[AVPS] = {
#define TGPP_DEF(id, code, vendor, name, flags, type) { code, vendor, name, flags, type, NULL },
	TGPP_AVPS(TGPP_DEF)
#undef TGPP_DEF
};

static const struct {
	uint32_t code;
	const char *name;
	uint8_t request;
} commands[COMMANDS] = {
	{ CMD_AIR, "Authentication-Information-Request", CMD_FLAG_REQUEST },
	{ CMD_AIR, "Authentication-Information-Answer", 0 },
	{ CMD_ULR, "Update-Location-Request", CMD_FLAG_REQUEST },
	{ CMD_ULR, "Update-Location-Answer", 0 },
	{ CMD_MAR, "3GPP/Multimedia-Auth-Request", CMD_FLAG_REQUEST },
	{ CMD_MAR, "3GPP/Multimedia-Auth-Answer", 0 },
};

/* <fixed> {required} [optional], * many. What is not named may be there, too. */
#define REQUEST "<Session-Id> {Auth-Session-State} {Origin-Host} {Origin-Realm} [Destination-Host] " \
	"{Destination-Realm} *[Supported-Features] *[Proxy-Info] *[Route-Record] {User-Name} "
#define ANSWER "<Session-Id> {Auth-Session-State} {Origin-Host} {Origin-Realm} [Result-Code] [Experimental-Result] " \
	"*[Supported-Features] [Failed-AVP] *[Proxy-Info] *[Route-Record] [Error-Diagnostic] "
static const struct {
	int parent;
	const char *rules;
} grammar[] = {
	/* TS 29.272, 7.2.3 to 7.2.6 */
	{ IS_COMMAND | AIR, REQUEST "[Vendor-Specific-Application-Id] {Visited-PLMN-Id} "
			    "[Requested-EUTRAN-Authentication-Info] [Requested-UTRAN-GERAN-Authentication-Info]" },
	{ IS_COMMAND | AIA, ANSWER "[Vendor-Specific-Application-Id] *[Authentication-Info]" },
	{ IS_COMMAND | ULR, REQUEST "[Vendor-Specific-Application-Id] {Visited-PLMN-Id} {RAT-Type} {ULR-Flags} "
			    "[Terminal-Information]" },
	{ IS_COMMAND | ULA, ANSWER "[Vendor-Specific-Application-Id] [ULA-Flags] [Subscription-Data]" },
	/* TS 29.229, 6.1.7 and 6.1.8, with what SWx and Zh leave out */
	{ IS_COMMAND | MAR, REQUEST "{Vendor-Specific-Application-Id} {SIP-Number-Auth-Items} {SIP-Auth-Data-Item} "
			    "[Public-Identity] [Server-Name] [Visited-Network-Identifier] [RAT-Type] "
			    "[Terminal-Information]" },
	{ IS_COMMAND | MAA, ANSWER "{Vendor-Specific-Application-Id} [User-Name] [Public-Identity] "
			   "[SIP-Number-Auth-Items] *[SIP-Auth-Data-Item]" },
	/* TS 29.272, 7.3.2 to 7.3.41 */
	{ A_TERMINAL_INFORMATION, "[IMEI] [Software-Version]" },
	{ A_REQUESTED_EUTRAN, "[Number-Of-Requested-Vectors] [Immediate-Response-Preferred] "
			      "[Re-Synchronization-Info]" },
	{ A_REQUESTED_UTRAN_GERAN, "[Number-Of-Requested-Vectors] [Immediate-Response-Preferred] "
				   "[Re-Synchronization-Info]" },
	{ A_AUTHENTICATION_INFO, "*[E-UTRAN-Vector] *[UTRAN-Vector] *[GERAN-Vector]" },
	{ A_EUTRAN_VECTOR, "[Item-Number] {RAND} {XRES} {AUTN} {KASME}" },
	{ A_UTRAN_VECTOR, "[Item-Number] {RAND} {XRES} {AUTN} {Confidentiality-Key} {Integrity-Key}" },
	{ A_GERAN_VECTOR, "[Item-Number] {RAND} {SRES} {Kc}" },
	{ A_SUBSCRIPTION_DATA, "[Subscriber-Status] [Network-Access-Mode] [AMBR] [APN-Configuration-Profile]" },
	{ A_AMBR, "{Max-Requested-Bandwidth-UL} {Max-Requested-Bandwidth-DL}" },
	{ A_APN_CONFIGURATION_PROFILE, "{Context-Identifier} {All-APN-Configurations-Included-Indicator} "
				       "1*{APN-Configuration}" },
	{ A_APN_CONFIGURATION, "{Context-Identifier} {PDN-Type} {Service-Selection} "
			       "[EPS-Subscribed-QoS-Profile] [AMBR]" },
	{ A_QOS_PROFILE, "{QoS-Class-Identifier} {Allocation-Retention-Priority}" },
	{ A_ARP, "{Priority-Level}" },
	/* TS 29.229, 6.3.13 and 6.3.29 */
	{ A_SIP_AUTH_DATA_ITEM, "[SIP-Item-Number] [SIP-Authentication-Scheme] [SIP-Authenticate] [SIP-Authorization] "
				"[Confidentiality-Key] [Integrity-Key]" },
	{ A_SUPPORTED_FEATURES, "{Vendor-Id} {Feature-List-ID} {Feature-List}" },
	/* RFC 6733, 6.7.2, 6.11 and 7.6; the first and the last have rules in the base dictionary */
	{ A_PROXY_INFO, "{Proxy-Host} {Proxy-State}" },
	{ A_VENDOR_SPECIFIC, "{Vendor-Id} [Auth-Application-Id]" },
	{ A_EXPERIMENTAL_RESULT, "{Vendor-Id} {Experimental-Result-Code}" },
	/* docs/s6a.md */
	{ A_BINDING_REQUEST, "{Binding-Payload} {Binding-Attempt}" },
	{ A_BINDING_ANSWER, "{Binding-Status} [NW-Sig]" },
};

static struct rule {
	int parent;
	enum avp_id avp;
	enum rule_position position;
	int min, max;	/* max -1: any number */
} rules[MAX_RULES];
static int rule_count;

static int rule_make(int parent, char *word)
{
	struct rule *r = &rules[rule_count];
	int many = 0, i;

	if (rule_count == MAX_RULES)
		return ENOSPC;
	for (; *word == '1' || *word == '*'; word++)
		many = 1;
	*r = (struct rule){ .parent = parent, .max = many ? -1 : 1 };
	r->position = *word == '<' ? RULE_FIXED_HEAD : *word == '{' ? RULE_REQUIRED : RULE_OPTIONAL;
	r->min = *word != '[';
	word++;
	word[strlen(word) - 1] = 0;
	for (i = 0; i < AVPS; i++)
		if (!strcmp(avps[i].name, word)) {
			r->avp = (enum avp_id)i;
			rule_count++;
			return 0;
		}
	LOG_E("tgpp: the grammar names %s, which is no AVP", word);
	return ENOENT;
}

static int rules_make(void)
{
	char text[1024], *word, *rest;
	size_t i;

	for (i = 0; i < sizeof(grammar) / sizeof(*grammar); i++) {
		if (snprintf(text, sizeof(text), "%s", grammar[i].rules) >= (int)sizeof(text))
			return ENOSPC;
		for (word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
			CHECK_FCT(rule_make(grammar[i].parent, word));
	}
	return 0;
}

static int conflict(const char *name, int err)
{
	if (err)
		fd_log(FD_LOG_ERROR, "tgpp: %s: %s: the dictionary has it with other data", name, strerror(err));
	return err;
}

static int avp_make(enum avp_id id, int hss)
{
	struct dictionary *dict = fd_g_config->cnf_dict;
	struct dict_avp_data data = {
		.avp_code = avps[id].code, .avp_vendor = avps[id].vendor, .avp_name = (char *)avps[id].name,
		.avp_flag_mask = AVP_FLAG_VENDOR | AVP_FLAG_MANDATORY, .avp_flag_val = avps[id].flags,
		.avp_basetype = avps[id].type,
	};
	avp_code_t code = avps[id].code;

	if (hss && avps[id].vendor == VENDOR_OWN)
		return 0;
	if (!avps[id].vendor) {	/* the base dictionary's, of a derived type */
		CHECK_FCT(fd_dict_search(dict, DICT_AVP, AVP_BY_CODE, &code, &avps[id].model, 0));
		if (avps[id].model)
			return 0;
	}
	return conflict(avps[id].name, fd_dict_new(dict, DICT_AVP, &data, NULL, &avps[id].model));
}

static int command_make(enum command c)
{
	struct dict_cmd_data data = {
		.cmd_code = commands[c].code, .cmd_name = (char *)commands[c].name,
		.cmd_flag_mask = CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE | CMD_FLAG_ERROR,
		.cmd_flag_val = commands[c].request | CMD_FLAG_PROXIABLE,
	};

	return conflict(commands[c].name, fd_dict_new(fd_g_config->cnf_dict, DICT_COMMAND, &data,
						      tgpp_apps[commands[c].code == CMD_MAR ? CX : S6A],
						      &tgpp_commands[c]));
}

static int rule_define(const struct rule *r)
{
	struct dict_object *parent = r->parent & IS_COMMAND ? tgpp_commands[r->parent & ~IS_COMMAND] :
							      avps[r->parent].model;
	struct dict_rule_data data = { avps[r->avp].model, r->position, r->position == RULE_FIXED_HEAD,
				       r->min, r->max };

	if (!parent || !data.rule_avp || !(r->parent & IS_COMMAND || avps[r->parent].vendor))
		return 0;	/* ours, or the base dictionary's */
	return conflict(avps[r->avp].name, fd_dict_new(fd_g_config->cnf_dict, DICT_RULE, &data, parent, NULL));
}

int tgpp_dictionary(int hss)
{
	static const char *const app_names[APPS] = { "S6A", "Cx", "SWx", "Zh", "Wx" };
	struct dictionary *dict = fd_g_config->cnf_dict;
	struct dict_vendor_data tgpp = { VENDOR_3GPP, (char *)"3GPP" }, own = { VENDOR_OWN, (char *)"Binding" };
	int i;

	CHECK_FCT(rules_make());
	CHECK_FCT(conflict("3GPP", fd_dict_new(dict, DICT_VENDOR, &tgpp, NULL, &tgpp_vendor)));
	if (!hss)
		CHECK_FCT(fd_dict_new(dict, DICT_VENDOR, &own, NULL, NULL));
	for (i = 0; i < APPS; i++) {
		struct dict_application_data data = { tgpp_app_ids[i], (char *)app_names[i] };

		CHECK_FCT(conflict(app_names[i], fd_dict_new(dict, DICT_APPLICATION, &data, tgpp_vendor,
							&tgpp_apps[i])));
	}
	for (i = 0; i < AVPS; i++)
		CHECK_FCT(avp_make((enum avp_id)i, hss));
	for (i = 0; i < COMMANDS; i++)
		CHECK_FCT(command_make((enum command)i));
	for (i = 0; hss && i < rule_count; i++)
		CHECK_FCT(rule_define(&rules[i]));
	return 0;
}

/* From the header alone, so that an unparsed AVP will do. */
static int avp_is(struct avp *avp, uint32_t vendor, uint32_t code)
{
	struct avp_hdr *h;

	return !fd_msg_avp_hdr(avp, &h) && h->avp_code == code &&
	       (h->avp_flags & AVP_FLAG_VENDOR ? h->avp_vendor : 0) == vendor;
}

struct avp *next(struct avp *avp, enum avp_id id)
{
	while (avp && !fd_msg_browse(avp, MSG_BRW_NEXT, &avp, NULL) && avp)
		if (avp_is(avp, avps[id].vendor, avps[id].code))
			return avp;
	return NULL;
}

struct avp *child(msg_or_avp *parent, enum avp_id id)
{
	struct avp *avp = NULL;

	if (!parent || fd_msg_browse(parent, MSG_BRW_FIRST_CHILD, &avp, NULL) || !avp)
		return NULL;
	return avp_is(avp, avps[id].vendor, avps[id].code) ? avp : next(avp, id);
}

static union avp_value *value_of(struct avp *avp, int size)
{
	struct dict_object *model = NULL;
	struct dict_avp_data data;
	struct avp_hdr *h;

	if (!avp || fd_msg_avp_hdr(avp, &h) || !h->avp_value || fd_msg_model(avp, &model) || !model ||
	    fd_dict_getval(model, &data))
		return NULL;
	if (size)
		return data.avp_basetype == AVP_TYPE_UNSIGNED32 || data.avp_basetype == AVP_TYPE_INTEGER32 ?
		       h->avp_value : NULL;
	return data.avp_basetype == AVP_TYPE_OCTETSTRING ? h->avp_value : NULL;
}

uint8_t *octets(struct avp *avp, size_t *size)
{
	union avp_value *v = value_of(avp, 0);

	*size = v ? v->os.len : 0;
	return v ? v->os.data : NULL;
}

int u32_of(struct avp *avp, uint32_t *out)
{
	union avp_value *v = value_of(avp, 4);

	if (v)
		*out = v->u32;
	return !!v;
}

uint32_t result_of(struct msg *msg)
{
	uint32_t code = 0;

	if (!u32_of(child(msg, A_RESULT_CODE), &code))
		u32_of(child(child(msg, A_EXPERIMENTAL_RESULT), A_EXPERIMENTAL_RESULT_CODE), &code);
	return code;
}

static int add_value(msg_or_avp *parent, enum avp_id id, union avp_value *value)
{
	struct avp *avp;
	int err;

	CHECK_FCT(fd_msg_avp_new(avps[id].model, 0, &avp));
	err = fd_msg_avp_setvalue(avp, value);
	if (!err)
		err = fd_msg_avp_add(parent, MSG_BRW_LAST_CHILD, avp);
	if (err)
		fd_msg_free(avp);
	return err;
}

int add_octets(msg_or_avp *parent, enum avp_id id, const void *data, size_t size)
{
	union avp_value value = { .os = { (uint8_t *)data, size } };	/* the library copies it */

	return add_value(parent, id, &value);
}

int add_u32(msg_or_avp *parent, enum avp_id id, uint32_t number)
{
	union avp_value value = { .u32 = number };

	return add_value(parent, id, &value);
}

int add_group(msg_or_avp *parent, enum avp_id id, struct avp **out)
{
	int err;

	CHECK_FCT(fd_msg_avp_new(avps[id].model, 0, out));
	err = fd_msg_avp_add(parent, MSG_BRW_LAST_CHILD, *out);
	if (err)
		fd_msg_free(*out);
	return err;
}

static __thread char fault[160];

#define FAULT(...) (snprintf(fault, sizeof(fault), __VA_ARGS__), fault)

static int known(struct avp *a)
{
	struct avp_hdr *h;
	int i;

	if (fd_msg_avp_hdr(a, &h))
		return -1;
	for (i = 0; i < AVPS; i++)
		if (avp_is(a, avps[i].vendor, avps[i].code))
			return i;
	return -1;
}

static int occurs(msg_or_avp *parent, enum avp_id id)
{
	struct avp *a;
	int n = 0;

	for (a = child(parent, id); a; a = next(a, id))
		n++;
	return n;
}

static const char *group_fault(msg_or_avp *group, int parent, const char *name, int depth)
{
	struct avp *a = NULL;
	struct avp_hdr *h;
	const char *what;
	int i, n;

	for (i = 0; i < rule_count; i++) {
		if (rules[i].parent != parent)
			continue;
		n = occurs(group, rules[i].avp);
		if (n < rules[i].min)
			return FAULT("no %s in %s", avps[rules[i].avp].name, name);
		if (rules[i].max >= 0 && n > rules[i].max)
			return FAULT("%d %s in %s", n, avps[rules[i].avp].name, name);
		if (rules[i].position == RULE_FIXED_HEAD &&
		    (fd_msg_browse(group, MSG_BRW_FIRST_CHILD, &a, NULL) || !a || known(a) != (int)rules[i].avp))
			return FAULT("%s is not the first in %s", avps[rules[i].avp].name, name);
	}
	if (depth == MAX_DEPTH || fd_msg_browse(group, MSG_BRW_FIRST_CHILD, &a, NULL))
		return NULL;
	for (; a; a = fd_msg_browse(a, MSG_BRW_NEXT, &a, NULL) ? NULL : a) {
		if (fd_msg_avp_hdr(a, &h))
			return FAULT("an AVP without a header in %s", name);
		n = known(a);
		if (n < 0 && h->avp_flags & AVP_FLAG_MANDATORY)
			return FAULT("AVP %u of vendor %u in %s must be known, and is not", h->avp_code,
				     h->avp_vendor, name);
		if (n < 0)
			continue;
		if ((h->avp_flags & VM) != avps[n].flags && n != A_ERROR_MESSAGE && n != A_ERROR_REPORTING_HOST)
			return FAULT("%s has flags %02x, not %02x", avps[n].name, h->avp_flags, avps[n].flags);
		if (avps[n].type == GROUP && n != A_FAILED_AVP && (what = group_fault(a, n, avps[n].name, depth + 1)))
			return what;
	}
	return NULL;
}

/* In answers with the E bit Session-Id may lack, and the rest of the command (RFC 6733, 7.2). */
static const char *error_fault(struct msg *m)
{
	if (!child(m, A_ORIGIN_HOST) || !child(m, A_ORIGIN_REALM) || !child(m, A_RESULT_CODE))
		return "no Origin-Host, Origin-Realm or Result-Code in an answer with the E bit";
	return result_of(m) / 1000 == 3 ? NULL : FAULT("the E bit with result %u", result_of(m));
}

const char *tgpp_fault(struct msg *m)
{
	struct msg_hdr *h;
	int i;

	if (fd_msg_hdr(m, &h))
		return "no header";
	if (h->msg_flags & CMD_FLAG_ERROR)
		return error_fault(m);
	for (i = 0; i < COMMANDS; i++)
		if (commands[i].code == h->msg_code && !commands[i].request)
			break;
	if (i == COMMANDS)
		return "a command that is none of ours";
	if (occurs(m, A_RESULT_CODE) + occurs(m, A_EXPERIMENTAL_RESULT) != 1)
		return FAULT("%d Result-Code and %d Experimental-Result", occurs(m, A_RESULT_CODE),
			     occurs(m, A_EXPERIMENTAL_RESULT));
	if (result_of(m) / 1000 == 3 && child(m, A_RESULT_CODE))
		return FAULT("result %u without the E bit", result_of(m));
	return group_fault(m, IS_COMMAND | i, commands[i].name, 0);
}

static int nibble(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int unhex(char *text, size_t *size)
{
	size_t i, len = strlen(text);

	*size = 0;
	if (!strcmp(text, "-"))
		return 0;
	if (!len || len % 2)
		return EINVAL;
	for (i = 0; i < len; i += 2) {
		int hi = nibble(text[i]), lo = nibble(text[i + 1]);

		if (hi < 0 || lo < 0)
			return EINVAL;
		((uint8_t *)text)[i / 2] = (uint8_t)(hi << 4 | lo);
	}
	*size = len / 2;
	return 0;
}
