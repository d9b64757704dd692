/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small HSS for tests, in the order that Open5GS's has: the library, its configuration with all extensions, only then a
 * dictionary with all rules of TS 29.272, the handlers, and the connections. As there, an object of the dictionary that
 * exists with other data ends it, and of what is logged only errors are seen.
 *
 *	hssd freeDiameter.conf subscribers [act]
 *
 * With "act" handlers hand answers back by DISP_ACT_SEND, else fd_msg_send() sends them: real ones do either.
 * A line of the file is "IMSI K OPc [mark]...", with the marks
 *
 *	air=CODE ulr=CODE mar=CODE	answers such a request with that result
 *	repeat				has one RAND in all its vectors, in each answer
 *	split				puts each vector into an Authentication-Info of its own
 *	slow=MILLISECONDS		takes so long for an answer
 */
#include "milenage.h"
#include "tgpp.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#define IMSI_MAX	15
#define VECTORS_MAX	5
#define SQN_STEP	32u	/* TS 33.102, C.3.2: 5 bits of index */
#define SQN_MASK	0xffffffffffffull
#define SKIP_SUBSCRIBER_DATA	(1u << 2)	/* TS 29.272, 7.3.7 */

/* Result codes that are 3GPP's (TS 29.272, 7.4). */
#define USER_UNKNOWN	5001u
#define NO_AUTH_DATA	4181u

struct subscriber {
	char imsi[IMSI_MAX + 1];
	uint8_t k[BLOCK], opc[BLOCK];
	uint64_t sqn;		/* of the next vector; atomic */
	uint32_t result[COMMANDS];
	long slow;
	int repeat, split;
};

/* What a request says, copied out before it becomes the answer. */
struct request {
	enum command command;
	uint32_t app;
	struct subscriber *sub;
	const char *error;	/* Result-Code by name */
	uint32_t result;	/* or a number, 0: success */
	uint32_t eutran, utran, sip, ulr_flags;
	uint8_t resync_info[RESYNC_SIZE];
	int resync;
	uint8_t plmn[PLMN_SIZE];
	char user[64];
};

static struct subscriber *subs;
static size_t sub_count, sub_room;
static int by_action;

static uint64_t take_sqn(struct subscriber *s)
{
	return __atomic_fetch_add(&s->sqn, SQN_STEP, __ATOMIC_RELAXED) & SQN_MASK;
}

static int make_vector(struct request *r, int eps, struct vector *v)
{
	if (r->sub->repeat)
		memcpy(v->rand, r->sub->imsi, BLOCK);
	else if (getrandom(v->rand, BLOCK, 0) != BLOCK)
		return EIO;
	return milenage_vector(r->sub->k, r->sub->opc, take_sqn(r->sub), eps, r->plmn, v);
}

static int resynchronise(struct subscriber *s, const uint8_t info[RESYNC_SIZE])
{
	uint64_t sqn = 0;

	CHECK_FCT(milenage_open_auts(s->k, s->opc, info, &sqn));
	__atomic_store_n(&s->sqn, sqn + SQN_STEP, __ATOMIC_RELAXED);
	fprintf(stderr, "hssd: resynchronised %s\n", s->imsi);
	return 0;
}

/* Subscribers */

static int by_imsi(const void *a, const void *b)
{
	return strcmp(((const struct subscriber *)a)->imsi, ((const struct subscriber *)b)->imsi);
}

/* The digits of a User-Name before '@'; an EAP identity has one more before them (TS 23.003, 19.3.2). */
static struct subscriber *find_subscriber(const char *user)
{
	struct subscriber key;
	size_t size = strspn(user, "0123456789");

	if (user[size] && user[size] != '@')
		return NULL;
	if (size == IMSI_MAX + 1 && (*user == '0' || *user == '6')) {
		user++;
		size--;
	}
	if (!size || size > IMSI_MAX)
		return NULL;
	memcpy(key.imsi, user, size);
	key.imsi[size] = 0;
	return bsearch(&key, subs, sub_count, sizeof(key), by_imsi);
}

static int load_mark(struct subscriber *s, const char *mark)
{
	const char *value = strchr(mark, '=');
	long n = value ? strtol(value + 1, NULL, 10) : 0;

	if (!strcmp(mark, "repeat"))
		s->repeat = 1;
	else if (!strcmp(mark, "split"))
		s->split = 1;
	else if (!strncmp(mark, "air=", 4) && n > 0)
		s->result[AIR] = (uint32_t)n;
	else if (!strncmp(mark, "ulr=", 4) && n > 0)
		s->result[ULR] = (uint32_t)n;
	else if (!strncmp(mark, "mar=", 4) && n > 0)
		s->result[MAR] = (uint32_t)n;
	else if (!strncmp(mark, "slow=", 5) && n > 0)
		s->slow = n;
	else
		return EINVAL;
	return 0;
}

static int load_line(char *line)
{
	static const char blank[] = " \t\r\n";
	char *save, *imsi = strtok_r(line, blank, &save), *k, *opc, *mark;
	struct subscriber *s;
	size_t k_size, opc_size;

	if (!imsi || *imsi == '#')
		return 0;
	if (sub_count == sub_room) {
		sub_room = sub_room ? 2 * sub_room : 1024;
		s = realloc(subs, sub_room * sizeof(*subs));
		if (!s)
			return ENOMEM;
		subs = s;
	}
	s = &subs[sub_count];
	memset(s, 0, sizeof(*s));
	s->sqn = SQN_STEP;
	k = strtok_r(NULL, blank, &save);
	opc = strtok_r(NULL, blank, &save);
	if (strlen(imsi) > IMSI_MAX || imsi[strspn(imsi, "0123456789")] || !k || !opc || unhex(k, &k_size) || unhex(opc, &opc_size) ||
	    k_size != BLOCK || opc_size != BLOCK)
		return EINVAL;
	strcpy(s->imsi, imsi);
	memcpy(s->k, k, BLOCK);
	memcpy(s->opc, opc, BLOCK);
	while ((mark = strtok_r(NULL, blank, &save)))
		CHECK_FCT(load_mark(s, mark));
	sub_count++;
	return 0;
}

static int load(const char *path)
{
	FILE *f = fopen(path, "re");
	char line[256];
	size_t n = 0;
	int err = f ? 0 : errno;

	while (!err && fgets(line, sizeof(line), f)) {
		n++;
		err = load_line(line);
	}
	if (f)
		fclose(f);
	if (err) {
		fprintf(stderr, "hssd: %s, line %zu: %s\n", path, n, strerror(err));
		return err;
	}
	if (sub_count)
		qsort(subs, sub_count, sizeof(*subs), by_imsi);
	return 0;
}

/* Requests */

static void read_resync(struct avp *wanted, enum avp_id id, struct request *r)
{
	size_t size;
	const uint8_t *info = octets(child(wanted, id), &size);

	if (!info || !r->sub)
		return;
	/* Cx: SIP-Authorization is there for a resynchronisation only. */
	if (size != RESYNC_SIZE) {
		r->error = "DIAMETER_INVALID_AVP_LENGTH";
		return;
	}
	memcpy(r->resync_info, info, size);
	r->resync = 1;
}

static void read_wanted(struct msg *msg, enum avp_id group, struct request *r, uint32_t *out)
{
	struct avp *wanted = child(msg, group);

	if (!wanted)
		return;
	*out = 1;
	u32_of(child(wanted, A_NUMBER_OF_VECTORS), out);
	*out = *out < 1 ? 1 : *out > VECTORS_MAX ? VECTORS_MAX : *out;
	read_resync(wanted, A_RESYNC_INFO, r);
}

static void read_request(struct msg *msg, enum command command, struct request *r)
{
	struct msg_hdr *h;
	size_t size;
	const uint8_t *s = octets(child(msg, A_USER_NAME), &size);

	memset(r, 0, sizeof(*r));
	r->command = command;
	if (!fd_msg_hdr(msg, &h))
		r->app = h->msg_appl;
	if (!s) {
		r->error = "DIAMETER_MISSING_AVP";
		return;
	}
	if (size < sizeof(r->user) && !memchr(s, 0, size))
		memcpy(r->user, s, size);
	r->sub = find_subscriber(r->user);
	r->result = r->sub ? r->sub->result[command] : USER_UNKNOWN;
	u32_of(child(msg, A_ULR_FLAGS), &r->ulr_flags);
	if ((s = octets(child(msg, A_VISITED_PLMN_ID), &size))) {
		if (size == PLMN_SIZE)
			memcpy(r->plmn, s, size);
		else
			r->error = "DIAMETER_INVALID_AVP_LENGTH";
	}
	read_wanted(msg, A_REQUESTED_EUTRAN, r, &r->eutran);
	read_wanted(msg, A_REQUESTED_UTRAN_GERAN, r, &r->utran);
	if (u32_of(child(msg, A_SIP_NUMBER_AUTH_ITEMS), &r->sip))
		r->sip = r->sip < 1 ? 1 : r->sip > VECTORS_MAX ? VECTORS_MAX : r->sip;
	read_resync(child(msg, A_SIP_AUTH_DATA_ITEM), A_SIP_AUTHORIZATION, r);
}

/* Answers */

static int add_eutran(struct avp *info, const struct vector *v)
{
	struct avp *group;

	CHECK_FCT(add_group(info, A_EUTRAN_VECTOR, &group));
	CHECK_FCT(add_octets(group, A_RAND, v->rand, sizeof(v->rand)));
	CHECK_FCT(add_octets(group, A_XRES, v->xres, sizeof(v->xres)));
	CHECK_FCT(add_octets(group, A_AUTN, v->autn, sizeof(v->autn)));
	return add_octets(group, A_KASME, v->kasme, sizeof(v->kasme));
}

static int add_utran(struct avp *info, const struct vector *v)
{
	struct avp *group;

	CHECK_FCT(add_group(info, A_UTRAN_VECTOR, &group));
	CHECK_FCT(add_octets(group, A_RAND, v->rand, sizeof(v->rand)));
	CHECK_FCT(add_octets(group, A_XRES, v->xres, sizeof(v->xres)));
	CHECK_FCT(add_octets(group, A_AUTN, v->autn, sizeof(v->autn)));
	CHECK_FCT(add_octets(group, A_CONFIDENTIALITY_KEY, v->ck, sizeof(v->ck)));
	return add_octets(group, A_INTEGRITY_KEY, v->ik, sizeof(v->ik));
}

static int add_geran(struct avp *info, const struct vector *v)
{
	struct avp *group;

	CHECK_FCT(add_group(info, A_GERAN_VECTOR, &group));
	CHECK_FCT(add_octets(group, A_RAND, v->rand, sizeof(v->rand)));
	CHECK_FCT(add_octets(group, A_SRES, v->sres, sizeof(v->sres)));
	return add_octets(group, A_KC, v->kc, sizeof(v->kc));
}

static int add_sip(struct msg *ans, uint32_t number, const struct vector *v)
{
	static const char scheme[] = "Digest-AKAv1-MD5";
	uint8_t authenticate[BLOCK + AUTN_SIZE];
	struct avp *group;

	memcpy(authenticate, v->rand, BLOCK);
	memcpy(authenticate + BLOCK, v->autn, AUTN_SIZE);
	CHECK_FCT(add_group(ans, A_SIP_AUTH_DATA_ITEM, &group));
	CHECK_FCT(add_u32(group, A_SIP_ITEM_NUMBER, number));
	CHECK_FCT(add_octets(group, A_SIP_AUTHENTICATION_SCHEME, scheme, sizeof(scheme) - 1));
	CHECK_FCT(add_octets(group, A_SIP_AUTHENTICATE, authenticate, sizeof(authenticate)));
	CHECK_FCT(add_octets(group, A_SIP_AUTHORIZATION, v->xres, sizeof(v->xres)));
	CHECK_FCT(add_octets(group, A_CONFIDENTIALITY_KEY, v->ck, sizeof(v->ck)));
	return add_octets(group, A_INTEGRITY_KEY, v->ik, sizeof(v->ik));
}

/* A UTRAN and a GERAN vector for each that is asked for: an MME cannot say which it wants (TS 29.272, 7.3.12). */
static int add_vectors(struct msg *ans, struct request *r)
{
	struct avp *info = NULL;
	struct vector v;
	uint32_t i, kind;

	for (i = 0; i < r->sip; i++) {
		CHECK_FCT(make_vector(r, 0, &v));
		CHECK_FCT(add_sip(ans, i + 1, &v));
	}
	for (kind = 0; kind < 3; kind++)
		for (i = 0; i < (kind ? r->utran : r->eutran); i++) {
			CHECK_FCT(make_vector(r, !kind, &v));
			if (!info || r->sub->split)
				CHECK_FCT(add_group(ans, A_AUTHENTICATION_INFO, &info));
			CHECK_FCT((kind == 0 ? add_eutran : kind == 1 ? add_utran : add_geran)(info, &v));
		}
	return 0;
}

/* What an MME needs for a default bearer, and not a word more. */
static int add_subscription(struct msg *ans)
{
	struct avp *data, *profile, *apn, *group, *arp;

	CHECK_FCT(add_group(ans, A_SUBSCRIPTION_DATA, &data));
	CHECK_FCT(add_u32(data, A_SUBSCRIBER_STATUS, 0));
	CHECK_FCT(add_u32(data, A_NETWORK_ACCESS_MODE, 2));
	CHECK_FCT(add_group(data, A_AMBR, &group));
	CHECK_FCT(add_u32(group, A_BANDWIDTH_UL, 1u << 30));
	CHECK_FCT(add_u32(group, A_BANDWIDTH_DL, 1u << 30));
	CHECK_FCT(add_group(data, A_APN_CONFIGURATION_PROFILE, &profile));
	CHECK_FCT(add_u32(profile, A_CONTEXT_IDENTIFIER, 1));
	CHECK_FCT(add_u32(profile, A_ALL_APN_INCLUDED, 0));
	CHECK_FCT(add_group(profile, A_APN_CONFIGURATION, &apn));
	CHECK_FCT(add_u32(apn, A_CONTEXT_IDENTIFIER, 1));
	CHECK_FCT(add_u32(apn, A_PDN_TYPE, 0));
	CHECK_FCT(add_octets(apn, A_SERVICE_SELECTION, "internet", 8));
	CHECK_FCT(add_group(apn, A_QOS_PROFILE, &group));
	CHECK_FCT(add_u32(group, A_QCI, 9));
	CHECK_FCT(add_group(group, A_ARP, &arp));
	return add_u32(arp, A_PRIORITY_LEVEL, 8);
}

static int add_result(struct msg *ans, uint32_t code)
{
	const int base = code == 3004 || code == 5003 || code == 5012;	/* of RFC 6733 that an HSS has use for */
	struct avp *group;

	if (base)
		return fd_msg_rescode_set(ans, (char *)(code == 3004 ? "DIAMETER_TOO_BUSY" : code == 5003 ? "DIAMETER_AUTHORIZATION_REJECTED" :
							"DIAMETER_UNABLE_TO_COMPLY"), NULL, NULL, 1);
	CHECK_FCT(fd_msg_add_origin(ans, 0));
	CHECK_FCT(add_group(ans, A_EXPERIMENTAL_RESULT, &group));
	CHECK_FCT(add_u32(group, A_VENDOR_ID, VENDOR_3GPP));
	return add_u32(group, A_EXPERIMENTAL_RESULT_CODE, code);
}

static int fill_answer(struct msg *ans, struct request *r)
{
	struct avp *group;

	CHECK_FCT(add_group(ans, A_VENDOR_SPECIFIC, &group));
	CHECK_FCT(add_u32(group, A_VENDOR_ID, VENDOR_3GPP));
	CHECK_FCT(add_u32(group, A_AUTH_APPLICATION_ID, r->app));
	CHECK_FCT(add_u32(ans, A_AUTH_SESSION_STATE, 1));
	if (r->error)
		return fd_msg_rescode_set(ans, (char *)r->error, NULL, NULL, 1);
	if (!r->result && r->resync && resynchronise(r->sub, r->resync_info))
		r->result = NO_AUTH_DATA;
	if (r->result)
		return add_result(ans, r->result);
	CHECK_FCT(fd_msg_rescode_set(ans, (char *)"DIAMETER_SUCCESS", NULL, NULL, 1));
	if (r->command == ULR) {
		CHECK_FCT(add_u32(ans, A_ULA_FLAGS, 1));	/* separation indication */
		return r->ulr_flags & SKIP_SUBSCRIBER_DATA ? 0 : add_subscription(ans);
	}
	if (r->command == MAR) {
		CHECK_FCT(add_octets(ans, A_USER_NAME, r->user, strlen(r->user)));
		CHECK_FCT(add_u32(ans, A_SIP_NUMBER_AUTH_ITEMS, r->sip));
	}
	return add_vectors(ans, r);
}

/* An error returned from here would end the process. */
static int on_request(struct msg **msg, struct avp *avp, struct session *sess, void *data, enum disp_action *act)
{
	struct request r;

	read_request(*msg, (enum command)(uintptr_t)data, &r);
	if (r.sub && r.sub->slow)
		nanosleep(&(struct timespec){ r.sub->slow / 1000, r.sub->slow % 1000 * 1000000 }, NULL);
	if (fd_msg_new_answer_from_req(fd_g_config->cnf_dict, msg, 0)) {
		*act = DISP_ACT_ERROR;
		return 0;
	}
	if (fill_answer(*msg, &r)) {
		fprintf(stderr, "hssd: cannot make an answer\n");
		fd_msg_free(*msg);
		*msg = NULL;
	} else if (by_action) {
		*act = DISP_ACT_SEND;
	} else if (fd_msg_send(msg, NULL, NULL) && *msg) {
		fd_msg_free(*msg);
		*msg = NULL;
	}
	return 0;
}

static int listen_to(enum app app, enum command command)
{
	struct disp_when when = { .app = tgpp_apps[app], .command = tgpp_commands[command] };

	CHECK_FCT(fd_disp_register(on_request, DISP_HOW_CC, &when, (void *)(uintptr_t)command, NULL));
	/* It also makes the application local, so that requests come to us. */
	return fd_disp_app_support(tgpp_apps[app], tgpp_vendor, 1, 0);
}

static int start(const char *conf)
{
	int app;

	CHECK_FCT(fd_core_parseconf(conf));
	CHECK_FCT(tgpp_dictionary(1));
	CHECK_FCT(listen_to(S6A, AIR));
	CHECK_FCT(listen_to(S6A, ULR));
	for (app = CX; app < APPS; app++)
		CHECK_FCT(listen_to((enum app)app, MAR));
	CHECK_FCT(fd_core_start());
	return fd_core_waitstartcomplete();
}

int main(int argc, char **argv)
{
	sigset_t all;
	int signal;

	if (argc < 3 || argc > 4 || (argc == 4 && strcmp(argv[3], "act"))) {
		fprintf(stderr, "usage: hssd freeDiameter.conf subscribers [act]\n");
		return 2;
	}
	by_action = argc == 4;
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigfillset(&all);	/* all threads to come have them blocked */
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	fd_g_debug_lvl = FD_LOG_ERROR;
	if (load(argv[2]) || fd_core_initialize())
		return 1;
	if (start(argv[1])) {
		fprintf(stderr, "hssd: does not start\n");
		return 1;
	}
	fprintf(stderr, "hssd: %zu subscribers\n", sub_count);
	sigdelset(&all, SIGPIPE);
	do
		sigwait(&all, &signal);
	while (signal != SIGTERM && signal != SIGINT);
	CHECK_FCT_DO(fd_core_shutdown(), return 1);
	CHECK_FCT_DO(fd_core_wait_shutdown_complete(), return 1);
	free(subs);
	return 0;
}
