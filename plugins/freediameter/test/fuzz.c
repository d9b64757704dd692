/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A target of libFuzzer: what s6a.c does with messages from the wire, stream.c with replies of the service, and conf.c
 * with a configuration. The first seven bytes say which; the calls of the service are answered here, as they say.
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#define kme_start	real_start
#include "../service.c"
#include "../stream.c"
#undef kme_start

#include "../procedure.h"

int fd_msg_init(void);	/* the core's own, which it calls once it has read its configuration */

static unsigned choice;	/* what the calls come to */

int kme_start(struct kme_call *c)
{
	struct kme_reply *r = &c->reply;

	if (!c->request.data)
		return 0;	/* it has been refused */
	if (c->request.full)
		abort();	/* KME_CALL is too little */
	kme_reply_is(r, (enum kme_status)(choice % (KME_BUSY + 1)), "a reason");
	r->control = choice & 8 ? KME_PREPROCESSED : KME_PROVISIONING_ONLY;
	if (r->control == KME_PROVISIONING_ONLY)
		memcpy(r->attempt, "attempt", 8);
	r->bound = choice & 1;
	r->equipment = (enum kme_equipment)(KME_WHITELISTED + (choice & 8) / 8);
	memset(r->rands, 0x5a, sizeof(r->rands));
	choice /= 2;	/* the next call comes to something else */
	return 0;
}

void count(enum counter c)
{
}

void say_refused(struct msg *m, const char *imsi, const char *origin, const char *why)
{
	if (strlen(imsi) > 15 || strlen(origin) > MAX_ORIGIN || !*why)
		abort();
}

/*
 * AVPs as messages have them, without some of which few get far: an input says which of them its message begins with,
 * and the size of one value in them, which is as it should be otherwise.
 */
static struct {
	uint8_t octets[240];
	size_t size;
} usual[16];
static size_t values, odd, odd_size;	/* how many values there are; which one has another size; and this size */

/* Adds an AVP to others. */
static void put(size_t in, uint32_t vendor, uint32_t code, const void *data, size_t size)
{
	size_t head = vendor ? 12 : 8, all = head + size;
	const uint8_t octets[] = { 0, 0, (uint8_t)(code >> 8), (uint8_t)code, vendor ? 0x80 : 0, 0, 0, (uint8_t)all,
				   0, 0, (uint8_t)(vendor >> 8), (uint8_t)vendor };
	uint8_t *to = usual[in].octets + usual[in].size;

	if ((usual[in].size += (all + 3) & ~(size_t)3) > sizeof(usual[in].octets))
		abort();
	memcpy(to, octets, head);
	memcpy(to + head, data, size);
}

/* Adds one that is no group. */
static void value(size_t in, uint32_t vendor, uint32_t code, const void *data, size_t size)
{
	static const uint8_t zeros[64];

	if (values++ == odd)
		put(in, vendor, code, zeros, odd_size);
	else
		put(in, vendor, code, data, size);
}

/* Puts what there is into a group. */
static void wrap(size_t in, uint32_t vendor, uint32_t code)
{
	size_t size = usual[in].size;
	uint8_t octets[sizeof(usual[in].octets)];

	memcpy(octets, usual[in].octets, size);
	usual[in].size = 0;
	put(in, vendor, code, octets, size);
}

static void make_usual(void)
{
	static const uint32_t vectors[] = { TGPP_EUTRAN_VECTOR, TGPP_UTRAN_VECTOR, TGPP_GERAN_VECTOR };
	static const uint32_t wanted[] = { TGPP_REQUESTED_EUTRAN, TGPP_REQUESTED_UTRAN_GERAN };
	static const uint32_t sip[] = { TGPP_SIP_AUTHENTICATE, TGPP_SIP_AUTHORIZATION };
	static const uint8_t zeros[32], success[] = { 0, 0, 7, 0xd1 }, own[] = { 0, 0, 0x7e, 0xd9 }, one[] = { 0, 0, 0, 1 };
	size_t n = 0, i;

	memset(usual, 0, sizeof(usual));
	values = 0;
	value(n, 0, BASE_USER_NAME, "001010000000001", 15);
	value(n, 0, BASE_ORIGIN_HOST, "peer.test", 9);
	value(n, 0, BASE_ORIGIN_REALM, "mme.test", 8);
	n++;
	value(n, 0, BASE_VENDOR_ID, own, 4);
	value(n, VENDOR_3GPP, TGPP_FEATURE_LIST_ID, one, 4);
	value(n, VENDOR_3GPP, TGPP_FEATURE_LIST, one, 4);
	wrap(n, VENDOR_3GPP, TGPP_SUPPORTED_FEATURES);
	value(n++, VENDOR_3GPP, TGPP_VISITED_PLMN_ID, "\x00\xf1\x10", 3);
	for (i = 0; i < 3; i++) {
		value(n, VENDOR_3GPP, TGPP_RAND, zeros, 16);
		wrap(n, VENDOR_3GPP, vectors[i]);
		wrap(n++, VENDOR_3GPP, TGPP_AUTHENTICATION_INFO);
	}
	for (i = 0; i < 2; i++) {
		value(n, VENDOR_3GPP, TGPP_RESYNC_INFO, zeros, 30);
		wrap(n++, VENDOR_3GPP, wanted[i]);
		value(n, VENDOR_3GPP, sip[i], zeros, i ? 30 : 32);
		wrap(n++, VENDOR_3GPP, TGPP_SIP_AUTH_DATA_ITEM);
	}
	value(n, VENDOR_3GPP, TGPP_IMEI, "35209900000001", 14);
	wrap(n++, VENDOR_3GPP, TGPP_TERMINAL_INFORMATION);
	value(n, VENDOR_OWN, OWN_BINDING_PAYLOAD, zeros, 32);
	value(n, VENDOR_OWN, OWN_BINDING_ATTEMPT, "AAAA", 4);
	wrap(n++, VENDOR_OWN, OWN_BINDING_REQUEST);
	value(n, VENDOR_OWN, OWN_NW_SIG, zeros, 32);
	value(n, VENDOR_OWN, OWN_BINDING_STATUS, zeros, 4);
	wrap(n++, VENDOR_OWN, OWN_BINDING_ANSWER);
	value(n++, 0, BASE_RESULT_CODE, success, 4);
	value(n, 0, BASE_PROXY_HOST, "h", 1);
	value(n, 0, BASE_PROXY_STATE, "s", 1);
	wrap(n++, 0, BASE_PROXY_INFO);
	value(n++, 0, BASE_SESSION_ID, "s;1;1", 5);
	value(n, VENDOR_3GPP, TGPP_3GPP2_MEID, zeros, 14);
	wrap(n++, VENDOR_3GPP, TGPP_TERMINAL_INFORMATION);
	if (n > sizeof(usual) / sizeof(*usual))
		abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	fd_g_debug_lvl = FD_LOG_FATAL + 1;
	if (fd_core_initialize() || fd_msg_init() || dict_own(VENDOR_OWN) || dict_ready())
		abort();
	fd_g_config->cnf_diamid = (DiamId_t)"fuzz.test";
	fd_g_config->cnf_diamid_len = 9;
	fd_g_config->cnf_diamrlm = (DiamId_t)"test";
	fd_g_config->cnf_diamrlm_len = 4;
	service.calls = 8;
	service.n = 2;	/* of which one is asked */
	instances = calloc(2, sizeof(*instances));
	by_id = calloc(8, sizeof(*by_id));
	if (!instances || !by_id)
		abort();
	instances[0].url = instances[1].url = "unix:/s";
	conf.origin_rate = 1000000;
	conf.s13 = 1;
	conf.open.of[conf.open.n++] = "00102";
	conf.provision_from.of[conf.provision_from.n++] = "home";
	conf.provision_from.of[conf.provision_from.n++] = "26201";
	conf.home_realms.of[conf.home_realms.n++] = "mme.test";
	conf.legacy_mmes.of[conf.legacy_mmes.n++] = "*.old.test";
	return 0;
}

/* A message of these AVPs as it comes to one that passes it on: the top level is parsed, and nothing below. */
static struct msg *from_wire(uint32_t application, uint32_t command, uint8_t flags, const uint8_t *avps, size_t size)
{
	size_t all = 20 + ((size + 3) & ~(size_t)3);
	uint8_t *wire = calloc(1, all);
	struct msg *m = NULL;
	const uint8_t head[] = { 1, (uint8_t)(all >> 16), (uint8_t)(all >> 8), (uint8_t)all, flags, 0,
		(uint8_t)(command >> 8), (uint8_t)command, 1, 0, 0, (uint8_t)application };

	if (!wire)
		return NULL;
	memcpy(wire, head, sizeof(head));
	if (size)
		memcpy(wire + 20, avps, size);
	if (fd_msg_parse_buffer(&wire, all, &m))
		free(wire);
	else
		fd_msg_source_set(m, (DiamId_t)"peer.test", 9);
	return m;
}

static int is_whole(struct msg *m)
{
	uint8_t *bytes = NULL;
	size_t size;
	int whole = !fd_msg_bufferize(m, &bytes, &size);

	free(bytes);
	return whole;
}

static enum verdict all_steps(struct job *j)
{
	enum verdict v;

	while ((v = j->step(j)) == ASK)
		kme_start(&j->call);
	return v;
}

static void done(struct kme_call *c)
{
	free(c);
}

/* What comes on the stream, in two pieces, with a call of each method under way. */
static void take_pieces(const uint8_t *data, size_t size, size_t first)
{
	struct kme_reply reply;
	int method;

	for (method = KME_PREPARE; method <= KME_EQUIPMENT; method++) {
		struct kme_call *c = calloc(1, sizeof(*c));

		if (!c)
			abort();
		c->method = (enum kme_method)method;
		c->asked = 1;
		c->id = (uint64_t)method + 1;
		c->done = done;
		c->until = UINT64_MAX;
		c->tried = 1;
		link_newest(c, instances);
	}
	if (first > size)
		first = size;
	if (take((char *)data, 1, first, instances) == first)
		take((char *)data + first, 1, size - first, instances);
	if (instances->course == TURNED_AWAY)
		kme_parse_error(instances->refusal, strlen(instances->refusal), &reply);
	instances->in_size = 0;
	instances->course = GOES_ON;
	instances->away = 0;
	while (instances->oldest)
		end_call(instances->oldest);
	done_all();
}

static void read_configuration(const uint8_t *data, size_t size)
{
	struct conf before = conf;
	char path[32];
	int fd = memfd_create("conf", MFD_CLOEXEC);

	if (fd < 0 || write(fd, data, size) != (ssize_t)size)
		abort();
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	conf.services.n = 0;
	if (!conf_read(path) && (!conf.service.n || conf.service.calls < 1 || conf.handlers < 1))
		abort();
	close(fd);
	free(conf.text);
	conf = before;
}

/* As the host has it before its handlers: all of it is parsed. 0: it answers that itself. */
static int parsed(struct msg *m)
{
	struct fd_pei pei = { 0 };

	if (!fd_msg_parse_dict(m, fd_g_config->cnf_dict, &pei))
		return 1;
	if (pei.pei_avp_free)
		fd_msg_free(pei.pei_avp);
	return 0;
}

/* The request, or an answer with its request: which has the same AVPs, and that is as good as any. */
static void process(uint32_t application, uint32_t command, int request, int local, const uint8_t *avps, size_t size)
{
	struct job job = { .kind = !request ? ANSWER : local ? REQUEST_LOCAL : REQUEST_PASSING,
			   .step = request ? s6a_request : s6a_answer };
	struct msg *question;
	int whole;

	job.msg = from_wire(application, command, (uint8_t)(CMD_FLAG_PROXIABLE | (request ? CMD_FLAG_REQUEST : 0)),
			    avps, size);
	if (!job.msg)
		return;
	if (!request) {
		question = from_wire(application, command, CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE, avps, size);
		if (!question || fault_of(question)) {	/* there is no answer to it */
			fd_msg_free(job.msg);
			if (question)
				fd_msg_free(question);
			return;
		}
		parse(child(question, VENDOR_OWN, OWN_BINDING_ANSWER));	/* as established() has put it there */
		fd_msg_answ_associate(job.msg, question);
		if (local)
			fd_msg_source_set(job.msg, NULL, 0);
	}
	if (!local || parsed(job.msg)) {
		whole = is_whole(job.msg);
		if (all_steps(&job) != DROP && whole && !is_whole(job.msg))
			abort();	/* it would be cut short */
	}
	fd_msg_free(job.msg);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct {
		uint32_t application, command;
	} kinds[] = { { S6A_APP, CMD_AIR }, { S6A_APP, CMD_ULR }, { SWX_APP, CMD_MAR }, { CX_APP, CMD_MAR },
		      { S13_APP, CMD_ECR } };
	enum { LOCAL = 1, CONFIGURATION = 2 };
	struct kme_reply reply;
	unsigned kind, how, begins, of;
	uint8_t avps[sizeof(usual) + 4096];
	size_t all = 0, i;

	if (size < 7 || size > 4096)
		return 0;
	kind = data[0];
	choice = data[1];
	how = data[2];
	begins = data[3] | (unsigned)data[4] << 8;
	odd = data[5];
	odd_size = data[6] % 64;
	data += 7, size -= 7;
	if (how & CONFIGURATION) {
		read_configuration(data, size);
		return 0;
	}
	if (kind & 0x80) {
		kme_parse((enum kme_method)(kind % 6), data, size, choice % 40, &reply);
		kme_parse_error((const char *)data, size, &reply);
		take_pieces(data, size, choice);
		return 0;
	}
	conf.swx = conf.cx = kind & 4 ? MODE_PROCESS : MODE_REFUSE;
	conf.authorization_rejected = kind >> 3 & 1;
	conf.agents = (struct list){ .of = { "peer.test" }, .n = kind >> 4 & 1 };
	of = kind & 0x40 ? 4 : kind & 3;
	make_usual();
	for (i = 0; begins; i++, begins >>= 1)
		if (begins & 1) {
			memcpy(avps + all, usual[i].octets, usual[i].size);
			all += usual[i].size;
		}
	if (size)
		memcpy(avps + all, data, size);
	process(kinds[of].application, kinds[of].command, kind & 0x20, how & LOCAL || of == 4, avps, all + size);
	return 0;
}
