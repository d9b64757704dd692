/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A target of libFuzzer: what kme.c does with messages from the wire, and service.c with replies of the service. The first
 * byte says which; the calls of the service are answered here, as the byte says.
 */
#define kme_prepare	real_prepare
#define kme_restore	real_restore
#define kme_report	real_report
#define kme_establish	real_establish
#include "../service.c"
#undef kme_prepare
#undef kme_restore
#undef kme_report
#undef kme_establish

static enum kme_status verdict;
static enum kme_status kme_prepare(struct kme_caller *c, const char *imsi, const uint8_t rand[KME_RAND], struct kme_vector *out)
{
	memset(out, 0, sizeof(*out));
	memcpy(out->rand, rand, KME_RAND);
	memcpy(out->attempt, "attempt", verdict & 1 ? 0 : 7);
	return verdict;
}
static enum kme_status kme_restore(struct kme_caller *c, const char *imsi, uint8_t rand[KME_RAND])
{
	memset(rand, 1, KME_RAND);
	return verdict;
}
static enum kme_status kme_report(struct kme_caller *c, const char *imsi)
{
	return strlen(imsi) > 15 ? abort(), verdict : verdict;
}
static enum kme_status kme_establish(struct kme_caller *c, const char *imsi, const char *imei, const char *attempt, const uint8_t *payload, size_t size, uint8_t nw_sig[KME_NW_SIG])
{
	volatile uint8_t sum = 0;

	while (size)
		sum ^= payload[--size];
	memset(nw_sig, sum, KME_NW_SIG);
	return verdict;
}
#include "../kme.c"

int fd_msg_init(void);	/* the core's own, which it calls once it has read its configuration */

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	fd_g_debug_lvl = FD_LOG_FATAL + 1;
	if (fd_core_initialize() || fd_msg_init() || dictionary())
		abort();
	fd_g_config->cnf_diamid = (DiamId_t)"fuzz.test";
	fd_g_config->cnf_diamid_len = 9;
	fd_g_config->cnf_diamrlm = (DiamId_t)"test";
	fd_g_config->cnf_diamrlm_len = 4;
	conf.open[conf.opens++] = "00102";
	return 0;
}

/* A message of these AVPs as it comes to one that passes it on: the top level is parsed, and nothing below. */
static struct msg *from_wire(uint32_t command, uint8_t flags, const uint8_t *avps, size_t size)
{
	size_t all = 20 + ((size + 3) & ~(size_t)3);
	uint8_t *wire = calloc(1, all);
	struct msg *m = NULL;
	const uint8_t head[] = { 1, (uint8_t)(all >> 16), (uint8_t)(all >> 8), (uint8_t)all, flags, 0, (uint8_t)(command >> 8), (uint8_t)command,
		1, 0, 0, 0x23 };	/* S6A_APP */

	if (!wire)
		return NULL;
	memcpy(wire, head, sizeof(head));
	if (size)
		memcpy(wire + 20, avps, size);
	if (fd_msg_parse_buffer(&wire, all, &m))
		free(wire);
	return m;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct kme_vector vector;
	uint8_t nw_sig[KME_NW_SIG];
	char reason[64];
	struct msg *m, *question;
	uint32_t command;

	if (size < 1)
		return 0;
	verdict = (enum kme_status)(data[0] % 5);
	conf.rejected = (enum rejected)(data[0] / 5 % 3);
	command = data[0] & 0x40 ? CMD_AIR : CMD_ULR;
	data++, size--;
	if ((data[-1] & 0x30) == 0x30) {
		kme_parse_vector((const char *)data, size, &vector);
		kme_parse_nw_sig((const char *)data, size, nw_sig);
		snprintf(reason, sizeof(reason), "%.*s", (int)size, (const char *)data);
		kme_parse_reason(reason);
		return 0;
	}
	if (data[-1] & 0x80) {
		if (!(m = from_wire(command, CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE, data, size)))
			return 0;
		unseen_request(NULL, &m);
	} else {
		if (!(m = from_wire(command, CMD_FLAG_PROXIABLE, data, size)))
			return 0;
		/* Its question has the same AVPs, which is as good as any. */
		if ((question = from_wire(command, CMD_FLAG_REQUEST | CMD_FLAG_PROXIABLE, data, size))) {
			fd_msg_answ_associate(m, question);
			answer(NULL, m);
		}
	}
	fd_msg_free(m);
	return 0;
}
