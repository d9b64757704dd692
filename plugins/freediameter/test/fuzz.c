/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A target of libFuzzer: what s6a.c does with messages from the wire, and stream.c with replies of the service. The
 * first two bytes say which; the calls of the service are answered here, as they say.
 */
#define kme_start	real_start
#include "../service.c"
#include "../stream.c"
#undef kme_start

#include "../kme.h"

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
	instances->in_size = 0;
	instances->course = GOES_ON;
	instances->away = 0;
	while (instances->oldest)
		end_call(instances->oldest);
	done_all();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct {
		uint32_t application, command;
	} kinds[] = { { S6A_APP, CMD_AIR }, { S6A_APP, CMD_ULR }, { SWX_APP, CMD_MAR }, { CX_APP, CMD_MAR },
		      { S13_APP, CMD_ECR } };
	struct job job = { .kind = REQUEST_PASSING };
	struct kme_reply reply;
	struct msg *question;
	struct fd_pei pei = { 0 };
	unsigned kind, of;
	int whole;

	if (size < 2)
		return 0;
	kind = data[0];
	choice = data[1];
	data += 2, size -= 2;
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
	job.msg = from_wire(kinds[of].application, kinds[of].command,
			    (uint8_t)(CMD_FLAG_PROXIABLE | (kind & 0x20 ? CMD_FLAG_REQUEST : 0)), data, size);
	if (!job.msg)
		return 0;
	if (kind & 0x20) {
		job.step = s6a_request;
		if (of == 4) {	/* which is for this host, and has been parsed */
			job.kind = REQUEST_LOCAL;
			if (fd_msg_parse_dict(job.msg, fd_g_config->cnf_dict, &pei)) {
				if (pei.pei_avp_free)
					fd_msg_free(pei.pei_avp);
				fd_msg_free(job.msg);
				return 0;
			}
		}
	} else {
		job.kind = ANSWER;
		job.step = s6a_answer;
		/* Its question has the same AVPs, which is as good as any. */
		question = from_wire(kinds[of].application, kinds[of].command,
				     CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE, data, size);
		if (question)
			fd_msg_answ_associate(job.msg, question);
	}
	whole = is_whole(job.msg);
	if (all_steps(&job) != DROP && whole && !is_whole(job.msg))
		abort();	/* it would be cut short */
	fd_msg_free(job.msg);
	return 0;
}
