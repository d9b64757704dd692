/* SPDX-License-Identifier: Apache-2.0 */
/* Reads requests, says whether keysvc may be asked about them, and refuses them. */
#include <ctype.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "procedure.h"

enum verdict refuse(struct job *j, const char *why, const char *result, uint32_t experimental)
{
	say_refused(j->msg, j->imsi, j->origin, why);
	return s6a_refuse(&j->msg, result, experimental) ? DROP : REPLY;
}

/* The answer to a request that cannot be read, or is ambiguous. */
enum verdict malformed(struct job *j, const char *result)
{
	count(MALFORMED);
	return refuse(j, "it is malformed", result, 0);
}

int asked_in_vain(struct job *j)
{
	return j->call.reply.status == KME_UNAVAILABLE || j->call.reply.status == KME_BUSY;
}

void count_outcome(struct job *j, enum counter done)
{
	enum kme_status status = j->call.reply.status;

	count(status == KME_OK ? done :
	      status == KME_BUSY ? OVERLOADED :
	      status == KME_UNAVAILABLE ? UNAVAILABLE : REFUSED);
}

/* Whether the service is away and this IMSI may pass all the same. */
int passes(struct job *j)
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

const char *unavailable(struct job *j)
{
	return j->call.reply.status == KME_BUSY ? TOO_BUSY : UNABLE_TO_COMPLY;
}

/* Who asks, and for whom */

/* The text in an AVP, in lower case. It is empty if there is none, if it is not visible ASCII, or if it is too long. */
void text_of(struct avp *a, char *out, size_t room)
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
 * IMS. An HSS may read an IMSI where others see none: all digits of the name with its realm, or an MSISDN (Open5GS 2.8
 * does both). So an IMSI must have 15 digits there, and nothing beside it can be read as another one.
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

/* Whether the MME knows binding (TS 29.229, 6.3.29). 0: the feature list cannot be read. */
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
int read_request(struct job *j, struct msg *request)
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

/* A request that comes directly from a peer is the peer's own, unless the configuration names the peer as an agent. */
int is_spoofed(struct job *j)
{
	DiamId_t source = NULL;

	return !*j->origin || fd_msg_source_get(j->msg, &source, NULL) ||
	       (source && strcasecmp(source, j->origin) && !conf_names(&conf.agents, source));
}

/*
 * Parses what we read of a request: of a forwarded one, the host has parsed only the top level, without values. An AVP
 * that is there twice is refused: another node could read the other one.
 */
const char *fault_of(struct msg *m)
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

/* A rate for each origin: one second's requests at once, then as many a second. Too many origins share rates. */
int within_rate(const char *origin)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static struct {
		uint64_t who, full_at;	/* when its whole burst is available again, in microseconds */
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
