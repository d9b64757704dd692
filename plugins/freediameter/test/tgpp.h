/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the test peers know of Diameter: S6a (3GPP TS 29.272), Multimedia-Auth of Cx (TS 29.229), SWx (TS 29.273) and Zh
 * (TS 29.109), and our own AVPs. It shares nothing with the extension, so that neither hides what the other has wrong.
 */
#ifndef TGPP_H
#define TGPP_H

#include <freeDiameter/extension.h>

#define VENDOR_3GPP	10415u
#define VENDOR_OWN	32473u	/* RFC 5612: reserved for examples */

#define CMD_MAR		303u
#define CMD_ULR		316u
#define CMD_AIR		318u

enum app { S6A, CX, SWX, ZH, WX, APPS };
enum command { AIR, AIA, ULR, ULA, MAR, MAA, COMMANDS };

/* X(id, code, vendor, name, flags, type). What is vendor 0 stands in the base dictionary, but for Service-Selection. */
#define TGPP_AVPS(X) \
	X(USER_NAME, 1, 0, "User-Name", M, OCTETS) \
	X(PROXY_STATE, 33, 0, "Proxy-State", M, OCTETS) \
	X(AUTH_APPLICATION_ID, 258, 0, "Auth-Application-Id", M, U32) \
	X(VENDOR_SPECIFIC, 260, 0, "Vendor-Specific-Application-Id", M, GROUP) \
	X(SESSION_ID, 263, 0, "Session-Id", M, OCTETS) \
	X(ORIGIN_HOST, 264, 0, "Origin-Host", M, OCTETS) \
	X(VENDOR_ID, 266, 0, "Vendor-Id", M, U32) \
	X(RESULT_CODE, 268, 0, "Result-Code", M, U32) \
	X(AUTH_SESSION_STATE, 277, 0, "Auth-Session-State", M, I32) \
	X(FAILED_AVP, 279, 0, "Failed-AVP", M, GROUP) \
	X(PROXY_HOST, 280, 0, "Proxy-Host", M, OCTETS) \
	X(ERROR_MESSAGE, 281, 0, "Error-Message", 0, OCTETS) \
	X(ROUTE_RECORD, 282, 0, "Route-Record", M, OCTETS) \
	X(DESTINATION_REALM, 283, 0, "Destination-Realm", M, OCTETS) \
	X(PROXY_INFO, 284, 0, "Proxy-Info", M, GROUP) \
	X(DESTINATION_HOST, 293, 0, "Destination-Host", M, OCTETS) \
	X(ERROR_REPORTING_HOST, 294, 0, "Error-Reporting-Host", 0, OCTETS) \
	X(ORIGIN_REALM, 296, 0, "Origin-Realm", M, OCTETS) \
	X(EXPERIMENTAL_RESULT, 297, 0, "Experimental-Result", M, GROUP) \
	X(EXPERIMENTAL_RESULT_CODE, 298, 0, "Experimental-Result-Code", M, U32) \
	X(SERVICE_SELECTION, 493, 0, "Service-Selection", M, OCTETS) \
	X(BANDWIDTH_DL, 515, 10415, "Max-Requested-Bandwidth-DL", VM, U32) \
	X(BANDWIDTH_UL, 516, 10415, "Max-Requested-Bandwidth-UL", VM, U32) \
	X(VISITED_NETWORK, 600, 10415, "Visited-Network-Identifier", VM, OCTETS) \
	X(PUBLIC_IDENTITY, 601, 10415, "Public-Identity", VM, OCTETS) \
	X(SERVER_NAME, 602, 10415, "Server-Name", VM, OCTETS) \
	X(SIP_NUMBER_AUTH_ITEMS, 607, 10415, "SIP-Number-Auth-Items", VM, U32) \
	X(SIP_AUTHENTICATION_SCHEME, 608, 10415, "SIP-Authentication-Scheme", VM, OCTETS) \
	X(SIP_AUTHENTICATE, 609, 10415, "SIP-Authenticate", VM, OCTETS) \
	X(SIP_AUTHORIZATION, 610, 10415, "SIP-Authorization", VM, OCTETS) \
	X(SIP_AUTH_DATA_ITEM, 612, 10415, "SIP-Auth-Data-Item", VM, GROUP) \
	X(SIP_ITEM_NUMBER, 613, 10415, "SIP-Item-Number", VM, U32) \
	X(CONFIDENTIALITY_KEY, 625, 10415, "Confidentiality-Key", VM, OCTETS) \
	X(INTEGRITY_KEY, 626, 10415, "Integrity-Key", VM, OCTETS) \
	X(SUPPORTED_FEATURES, 628, 10415, "Supported-Features", V, GROUP) \
	X(FEATURE_LIST_ID, 629, 10415, "Feature-List-ID", V, U32) \
	X(FEATURE_LIST, 630, 10415, "Feature-List", V, U32) \
	X(QCI, 1028, 10415, "QoS-Class-Identifier", VM, I32) \
	X(RAT_TYPE, 1032, 10415, "RAT-Type", VM, I32) \
	X(ARP, 1034, 10415, "Allocation-Retention-Priority", VM, GROUP) \
	X(PRIORITY_LEVEL, 1046, 10415, "Priority-Level", VM, U32) \
	X(SUBSCRIPTION_DATA, 1400, 10415, "Subscription-Data", VM, GROUP) \
	X(TERMINAL_INFORMATION, 1401, 10415, "Terminal-Information", VM, GROUP) \
	X(IMEI, 1402, 10415, "IMEI", VM, OCTETS) \
	X(SOFTWARE_VERSION, 1403, 10415, "Software-Version", VM, OCTETS) \
	X(ULR_FLAGS, 1405, 10415, "ULR-Flags", VM, U32) \
	X(ULA_FLAGS, 1406, 10415, "ULA-Flags", VM, U32) \
	X(VISITED_PLMN_ID, 1407, 10415, "Visited-PLMN-Id", VM, OCTETS) \
	X(REQUESTED_EUTRAN, 1408, 10415, "Requested-EUTRAN-Authentication-Info", VM, GROUP) \
	X(REQUESTED_UTRAN_GERAN, 1409, 10415, "Requested-UTRAN-GERAN-Authentication-Info", VM, GROUP) \
	X(NUMBER_OF_VECTORS, 1410, 10415, "Number-Of-Requested-Vectors", VM, U32) \
	X(RESYNC_INFO, 1411, 10415, "Re-Synchronization-Info", VM, OCTETS) \
	X(IMMEDIATE_RESPONSE, 1412, 10415, "Immediate-Response-Preferred", VM, U32) \
	X(AUTHENTICATION_INFO, 1413, 10415, "Authentication-Info", VM, GROUP) \
	X(EUTRAN_VECTOR, 1414, 10415, "E-UTRAN-Vector", VM, GROUP) \
	X(UTRAN_VECTOR, 1415, 10415, "UTRAN-Vector", VM, GROUP) \
	X(GERAN_VECTOR, 1416, 10415, "GERAN-Vector", VM, GROUP) \
	X(NETWORK_ACCESS_MODE, 1417, 10415, "Network-Access-Mode", VM, I32) \
	X(ITEM_NUMBER, 1419, 10415, "Item-Number", VM, U32) \
	X(CONTEXT_IDENTIFIER, 1423, 10415, "Context-Identifier", VM, U32) \
	X(SUBSCRIBER_STATUS, 1424, 10415, "Subscriber-Status", VM, I32) \
	X(ALL_APN_INCLUDED, 1428, 10415, "All-APN-Configurations-Included-Indicator", VM, I32) \
	X(APN_CONFIGURATION_PROFILE, 1429, 10415, "APN-Configuration-Profile", VM, GROUP) \
	X(APN_CONFIGURATION, 1430, 10415, "APN-Configuration", VM, GROUP) \
	X(QOS_PROFILE, 1431, 10415, "EPS-Subscribed-QoS-Profile", VM, GROUP) \
	X(AMBR, 1435, 10415, "AMBR", VM, GROUP) \
	X(RAND, 1447, 10415, "RAND", VM, OCTETS) \
	X(XRES, 1448, 10415, "XRES", VM, OCTETS) \
	X(AUTN, 1449, 10415, "AUTN", VM, OCTETS) \
	X(KASME, 1450, 10415, "KASME", VM, OCTETS) \
	X(KC, 1453, 10415, "Kc", VM, OCTETS) \
	X(SRES, 1454, 10415, "SRES", VM, OCTETS) \
	X(PDN_TYPE, 1456, 10415, "PDN-Type", VM, I32) \
	X(ERROR_DIAGNOSTIC, 1614, 10415, "Error-Diagnostic", V, I32) \
	X(BINDING_REQUEST, 1, 32473, "Binding-Request", V, GROUP) \
	X(BINDING_PAYLOAD, 2, 32473, "Binding-Payload", V, OCTETS) \
	X(BINDING_ATTEMPT, 3, 32473, "Binding-Attempt", V, OCTETS) \
	X(BINDING_ANSWER, 4, 32473, "Binding-Answer", V, GROUP) \
	X(NW_SIG, 5, 32473, "NW-Sig", V, OCTETS) \
	X(BINDING_STATUS, 6, 32473, "Binding-Status", V, U32) \
	X(BINDING_CONTROL, 7, 32473, "Binding-Control", V, U32)

#define TGPP_ID(id, ...) A_##id,
enum avp_id { TGPP_AVPS(TGPP_ID) AVPS };
#undef TGPP_ID

extern const uint32_t tgpp_app_ids[APPS];
extern struct dict_object *tgpp_apps[APPS], *tgpp_commands[COMMANDS], *tgpp_vendor;

/*
 * Makes the dictionary: for an HSS with all rules, and without what is ours, which no HSS knows. An object that is
 * there already with other data is an error, as it is in Open5GS.
 */
int tgpp_dictionary(int hss);

/* What is wrong with an answer: its grammar, flags and result. NULL: nothing. The text is the calling thread's. */
const char *tgpp_fault(struct msg *answer);

int add_octets(msg_or_avp *parent, enum avp_id id, const void *data, size_t size);
int add_u32(msg_or_avp *parent, enum avp_id id, uint32_t number);
int add_group(msg_or_avp *parent, enum avp_id id, struct avp **out);	/* empty, and in its place */

struct avp *next(struct avp *avp, enum avp_id id);
struct avp *child(msg_or_avp *parent, enum avp_id id);	/* NULL has none */
uint8_t *octets(struct avp *avp, size_t *size);
int u32_of(struct avp *avp, uint32_t *out);		/* whether there is one */
uint32_t result_of(struct msg *msg);			/* Result-Code, or Experimental-Result-Code, or 0 */

int unhex(char *text, size_t *size);			/* in place; "-" has no octets */

#endif
