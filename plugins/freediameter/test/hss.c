/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small S6a HSS for tests. Configuration string: [act:]<subscriber file>,
 * a line of the file being "IMSI K OPc". With "act:" answers are handed back
 * by DISP_ACT_SEND, else sent by fd_msg_send(): real handlers do either.
 */
#include "dict.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#define IMSI_MAX	15
#define BLOCK		16
#define SQN_SIZE	6
#define MAC_SIZE	8
#define RES_SIZE	8
#define PLMN_SIZE	3
#define KASME_SIZE	32
#define AUTS_SIZE	(SQN_SIZE + MAC_SIZE)
#define RESYNC_SIZE	(BLOCK + AUTS_SIZE)
#define VECTORS_MAX	5
#define SQN_STEP	32u		/* TS 33.102 C.3.2: 5 bits of index */
#define SQN_MASK	0xffffffffffffull
#define EXP_USER_UNKNOWN	5001u	/* TS 29.272, 7.4.3 */
#define EXP_NO_AUTH_DATA	4181u	/* TS 29.272, 7.4.4 */

struct subscriber {
	char imsi[IMSI_MAX + 1];
	uint8_t k[BLOCK];
	uint8_t opc[BLOCK];
	uint64_t sqn;		/* of the next vector; atomic */
};

/* TS 35.206: one keyed cipher and TEMP serve all functions of a RAND */
struct milenage {
	EVP_CIPHER_CTX *aes;
	const uint8_t *opc;
	uint8_t temp[BLOCK];
};

struct vector {
	uint8_t rand[BLOCK];
	uint8_t xres[RES_SIZE];
	uint8_t autn[SQN_SIZE + 2 + MAC_SIZE];
	uint8_t kasme[KASME_SIZE];
};

/* What a request says, copied out before it becomes the answer */
struct request {
	int air;
	struct subscriber *sub;
	const char *error;	/* Result-Code by name */
	uint32_t experimental;
	uint32_t vectors;
	int resync;
	uint8_t resync_info[RESYNC_SIZE];
	uint8_t plmn[PLMN_SIZE];
};

static const uint8_t amf_vector[2] = { 0x80, 0x00 };	/* TS 33.401: EPS */
static const uint8_t amf_resync[2] = { 0x00, 0x00 };	/* TS 33.102, 6.3.3 */

static struct subscriber *subs;
static size_t sub_count, sub_room;
static int by_action;
static EVP_CIPHER *aes128;
static struct disp_hdl *air_handler, *ulr_handler;

/* Milenage */

static void xor_into(uint8_t *to, const uint8_t *with, size_t size)
{
	while (size--)
		*to++ ^= *with++;
}

static int aes(struct milenage *m, const uint8_t in[BLOCK], uint8_t out[BLOCK])
{
	int size = 0;

	return EVP_EncryptUpdate(m->aes, out, &size, in, BLOCK) == 1 &&
	       size == BLOCK ? 0 : EIO;
}

static void milenage_end(struct milenage *m)
{
	EVP_CIPHER_CTX_free(m->aes);
	m->aes = NULL;
	OPENSSL_cleanse(m->temp, sizeof(m->temp));
}

static int milenage_begin(struct milenage *m, const struct subscriber *s,
			  const uint8_t rand[BLOCK])
{
	uint8_t in[BLOCK];

	m->opc = s->opc;
	m->aes = EVP_CIPHER_CTX_new();
	if (!m->aes)
		return ENOMEM;
	memcpy(in, rand, BLOCK);
	xor_into(in, s->opc, BLOCK);
	if (EVP_EncryptInit_ex2(m->aes, aes128, s->k, NULL, NULL) == 1 &&
	    EVP_CIPHER_CTX_set_padding(m->aes, 0) == 1 &&
	    !aes(m, in, m->temp))
		return 0;
	milenage_end(m);
	return EIO;
}

/* OUT1: f1 is its first half, f1* its second */
static int milenage_mac(struct milenage *m, const uint8_t sqn[SQN_SIZE],
			const uint8_t amf[2], uint8_t out[BLOCK])
{
	uint8_t in1[BLOCK], in[BLOCK];
	int i;

	memcpy(in1, sqn, SQN_SIZE);
	memcpy(in1 + SQN_SIZE, amf, 2);
	memcpy(in1 + 8, in1, 8);
	xor_into(in1, m->opc, BLOCK);
	for (i = 0; i < BLOCK; i++)		/* r1 = 64 bits, c1 = 0 */
		in[(i + 8) % BLOCK] = in1[i];
	xor_into(in, m->temp, BLOCK);
	if (aes(m, in, out))
		return EIO;
	xor_into(out, m->opc, BLOCK);
	return 0;
}

/* OUT2..OUT5: rotation in octets and the last octet of c choose which */
static int milenage_out(struct milenage *m, int rotate, uint8_t c,
			uint8_t out[BLOCK])
{
	uint8_t in[BLOCK];
	int i;

	for (i = 0; i < BLOCK; i++)
		in[(i + BLOCK - rotate) % BLOCK] = m->temp[i] ^ m->opc[i];
	in[BLOCK - 1] ^= c;
	if (aes(m, in, out))
		return EIO;
	xor_into(out, m->opc, BLOCK);
	return 0;
}

static void put_sqn(uint8_t out[SQN_SIZE], uint64_t sqn)
{
	int i;

	for (i = SQN_SIZE - 1; i >= 0; i--, sqn >>= 8)
		out[i] = sqn & 0xff;
}

static uint64_t get_sqn(const uint8_t in[SQN_SIZE])
{
	uint64_t sqn = 0;
	int i;

	for (i = 0; i < SQN_SIZE; i++)
		sqn = sqn << 8 | in[i];
	return sqn;
}

/* TS 33.401 A.2 */
static int derive_kasme(const uint8_t ck_ik[2 * BLOCK],
			const uint8_t plmn[PLMN_SIZE],
			const uint8_t hidden_sqn[SQN_SIZE],
			uint8_t out[KASME_SIZE])
{
	uint8_t s[1 + PLMN_SIZE + 2 + SQN_SIZE + 2] = { 0x10 };
	unsigned int size = 0;

	memcpy(s + 1, plmn, PLMN_SIZE);
	s[5] = PLMN_SIZE;
	memcpy(s + 6, hidden_sqn, SQN_SIZE);
	s[13] = SQN_SIZE;
	return HMAC(EVP_sha256(), ck_ik, 2 * BLOCK, s, sizeof(s), out, &size) &&
	       size == KASME_SIZE ? 0 : EIO;
}

static int fill_vector(struct milenage *m, struct vector *v, uint64_t sqn,
		       const uint8_t plmn[PLMN_SIZE])
{
	uint8_t out2[BLOCK], mac[BLOCK], ck_ik[2 * BLOCK], plain[SQN_SIZE];
	int err;

	put_sqn(plain, sqn);
	if (milenage_mac(m, plain, amf_vector, mac) ||
	    milenage_out(m, 0, 1, out2) ||
	    milenage_out(m, 4, 2, ck_ik) ||
	    milenage_out(m, 8, 4, ck_ik + BLOCK))
		return EIO;
	memcpy(v->xres, out2 + 8, RES_SIZE);
	memcpy(v->autn, plain, SQN_SIZE);
	xor_into(v->autn, out2, SQN_SIZE);	/* f5 is the head of OUT2 */
	memcpy(v->autn + SQN_SIZE, amf_vector, 2);
	memcpy(v->autn + SQN_SIZE + 2, mac, MAC_SIZE);
	err = derive_kasme(ck_ik, plmn, v->autn, v->kasme);
	OPENSSL_cleanse(ck_ik, sizeof(ck_ik));
	return err;
}

static uint64_t take_sqn(struct subscriber *s)
{
	return __atomic_fetch_add(&s->sqn, SQN_STEP, __ATOMIC_RELAXED) &
	       SQN_MASK;
}

static int make_vector(struct subscriber *s, const uint8_t plmn[PLMN_SIZE],
		       struct vector *v)
{
	struct milenage m;
	int err;

	if (getrandom(v->rand, BLOCK, 0) != BLOCK)
		return EIO;
	err = milenage_begin(&m, s, v->rand);
	if (err)
		return err;
	err = fill_vector(&m, v, take_sqn(s), plmn);
	milenage_end(&m);
	return err;
}

/* info = RAND || SQN_MS xor AK* || MAC-S (TS 33.102, 6.3.3) */
static int open_auts(struct milenage *m, const uint8_t info[RESYNC_SIZE],
		     uint64_t *sqn_ms)
{
	const uint8_t *auts = info + BLOCK;
	uint8_t out5[BLOCK], mac[BLOCK], sqn[SQN_SIZE];

	if (milenage_out(m, 12, 8, out5))
		return EIO;
	memcpy(sqn, auts, SQN_SIZE);
	xor_into(sqn, out5, SQN_SIZE);
	if (milenage_mac(m, sqn, amf_resync, mac))
		return EIO;
	if (CRYPTO_memcmp(mac + 8, auts + SQN_SIZE, MAC_SIZE))
		return EPERM;
	*sqn_ms = get_sqn(sqn);
	return 0;
}

static int resynchronise(struct subscriber *s, const uint8_t info[RESYNC_SIZE])
{
	struct milenage m;
	uint64_t sqn_ms = 0;
	int err;

	err = milenage_begin(&m, s, info);
	if (err)
		return err;
	err = open_auts(&m, info, &sqn_ms);
	milenage_end(&m);
	if (err)
		return err;
	__atomic_store_n(&s->sqn, sqn_ms + SQN_STEP, __ATOMIC_RELAXED);
	LOG_N("hss: resynchronised %s", s->imsi);
	return 0;
}

/* Subscribers */

static int by_imsi(const void *a, const void *b)
{
	return strcmp(((const struct subscriber *)a)->imsi,
		      ((const struct subscriber *)b)->imsi);
}

static struct subscriber *find_subscriber(const uint8_t *name, size_t size)
{
	struct subscriber key;

	if (!size || size > IMSI_MAX || memchr(name, 0, size))
		return NULL;
	memcpy(key.imsi, name, size);
	key.imsi[size] = 0;
	return bsearch(&key, subs, sub_count, sizeof(key), by_imsi);
}

static int nibble(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int unhex(const char *text, uint8_t *out, size_t size)
{
	size_t i;

	if (!text || strlen(text) != 2 * size)
		return EINVAL;
	for (i = 0; i < size; i++) {
		int hi = nibble(text[2 * i]), lo = nibble(text[2 * i + 1]);

		if (hi < 0 || lo < 0)
			return EINVAL;
		out[i] = hi << 4 | lo;
	}
	return 0;
}

static struct subscriber *new_subscriber(void)
{
	size_t room = sub_room ? 2 * sub_room : 1024;
	struct subscriber *more;

	if (sub_count == sub_room) {
		more = realloc(subs, room * sizeof(*subs));
		if (!more)
			return NULL;
		subs = more;
		sub_room = room;
	}
	return &subs[sub_count];
}

static int load_line(char *line)
{
	static const char blank[] = " \t\r\n";
	char *save, *imsi;
	struct subscriber *s;

	line[strcspn(line, "#")] = 0;
	imsi = strtok_r(line, blank, &save);
	if (!imsi)
		return 0;
	if (strlen(imsi) > IMSI_MAX || imsi[strspn(imsi, "0123456789")])
		return EINVAL;
	s = new_subscriber();
	if (!s)
		return ENOMEM;
	strcpy(s->imsi, imsi);
	s->sqn = SQN_STEP;
	if (unhex(strtok_r(NULL, blank, &save), s->k, BLOCK) ||
	    unhex(strtok_r(NULL, blank, &save), s->opc, BLOCK) ||
	    strtok_r(NULL, blank, &save))
		return EINVAL;
	sub_count++;
	return 0;
}

static int load_lines(FILE *f, const char *path)
{
	char line[256];
	unsigned long n = 0;
	int err;

	while (fgets(line, sizeof(line), f)) {
		n++;
		err = load_line(line);
		if (err) {
			LOG_E("hss: %s line %lu: %s", path, n, strerror(err));
			return err;
		}
	}
	return ferror(f) ? EIO : 0;
}

static int index_subscribers(const char *path)
{
	size_t i;

	if (!sub_count)
		return 0;
	qsort(subs, sub_count, sizeof(*subs), by_imsi);
	for (i = 1; i < sub_count; i++) {
		if (by_imsi(&subs[i - 1], &subs[i]))
			continue;
		LOG_E("hss: %s has %s twice", path, subs[i].imsi);
		return EEXIST;
	}
	return 0;
}

static int load(const char *path)
{
	FILE *f = fopen(path, "re");
	int err;

	if (!f) {
		err = errno;
		LOG_E("hss: %s: %s", path, strerror(err));
		return err;
	}
	err = load_lines(f, path);
	fclose(f);
	if (!err)
		err = index_subscribers(path);
	return err;
}

/* Requests */

static void read_identity(struct msg *msg, struct request *r)
{
	size_t size;
	const uint8_t *name = octets(child(msg, 0, BASE_USER_NAME), &size);

	if (!name) {
		r->error = "DIAMETER_MISSING_AVP";
		return;
	}
	r->sub = find_subscriber(name, size);
	if (!r->sub)
		r->experimental = EXP_USER_UNKNOWN;
}

static void read_plmn(struct msg *msg, struct request *r)
{
	size_t size;
	const uint8_t *plmn = octets(child(msg, VENDOR_3GPP,
					   TGPP_VISITED_PLMN_ID), &size);

	if (!plmn)
		r->error = "DIAMETER_MISSING_AVP";
	else if (size != PLMN_SIZE)
		r->error = "DIAMETER_INVALID_AVP_LENGTH";
	else
		memcpy(r->plmn, plmn, PLMN_SIZE);
}

static void read_resync(struct avp *wanted, struct request *r)
{
	size_t size;
	const uint8_t *info = octets(child(wanted, VENDOR_3GPP,
					   TGPP_RESYNC_INFO), &size);

	if (!info)
		return;
	if (size != RESYNC_SIZE) {
		r->error = "DIAMETER_INVALID_AVP_LENGTH";
		return;
	}
	memcpy(r->resync_info, info, size);
	r->resync = 1;
}

static void read_wanted(struct msg *msg, struct request *r)
{
	struct avp *wanted = child(msg, VENDOR_3GPP, TGPP_REQUESTED_EUTRAN);

	r->vectors = 1;
	u32_of(child(wanted, VENDOR_3GPP, TGPP_NUMBER_OF_VECTORS), &r->vectors);
	if (r->vectors < 1)
		r->vectors = 1;
	if (r->vectors > VECTORS_MAX)
		r->vectors = VECTORS_MAX;
	read_resync(wanted, r);
}

static void read_request(struct msg *msg, int air, struct request *r)
{
	memset(r, 0, sizeof(*r));
	r->air = air;
	read_identity(msg, r);
	if (!r->sub || !air)
		return;
	read_plmn(msg, r);
	if (!r->error)
		read_wanted(msg, r);
}

/* Answers */

static int add_vector(struct avp *info, const struct vector *v)
{
	struct avp *group;

	CHECK_FCT(add_group(info, a_eutran_vector, &group));
	CHECK_FCT(add_octets(group, a_rand, v->rand, sizeof(v->rand)));
	CHECK_FCT(add_octets(group, a_xres, v->xres, sizeof(v->xres)));
	CHECK_FCT(add_octets(group, a_autn, v->autn, sizeof(v->autn)));
	return add_octets(group, a_kasme, v->kasme, sizeof(v->kasme));
}

static int add_vectors(struct msg *ans, const struct vector *v, uint32_t count)
{
	struct avp *info;
	uint32_t i;

	CHECK_FCT(add_group(ans, a_authentication_info, &info));
	for (i = 0; i < count; i++)
		CHECK_FCT(add_vector(info, &v[i]));
	return 0;
}

static int add_experimental(struct msg *ans, uint32_t code)
{
	struct avp *group;

	CHECK_FCT(fd_msg_add_origin(ans, 0));
	CHECK_FCT(add_group(ans, a_experimental_result, &group));
	CHECK_FCT(add_u32(group, a_vendor_id, VENDOR_3GPP));
	return add_u32(group, a_experimental_result_code, code);
}

static int make_vectors(struct request *r, struct vector *v)
{
	uint32_t i;

	if (r->resync && resynchronise(r->sub, r->resync_info)) {
		r->experimental = EXP_NO_AUTH_DATA;
		return 0;
	}
	for (i = 0; i < r->vectors; i++)
		CHECK_FCT(make_vector(r->sub, r->plmn, &v[i]));
	return 0;
}

static int fill_answer(struct msg *ans, struct request *r)
{
	struct vector v[VECTORS_MAX];

	if (r->sub && r->air && !r->error && make_vectors(r, v))
		r->error = "DIAMETER_UNABLE_TO_COMPLY";
	if (r->error)
		return fd_msg_rescode_set(ans, (char *)r->error, NULL, NULL, 1);
	CHECK_FCT(add_u32(ans, a_auth_session_state, 1));
	if (r->experimental)
		return add_experimental(ans, r->experimental);
	CHECK_FCT(fd_msg_rescode_set(ans, (char *)"DIAMETER_SUCCESS", NULL,
				     NULL, 1));
	if (!r->air)
		return add_u32(ans, a_ula_flags, 1);	/* separation indication */
	return add_vectors(ans, v, r->vectors);
}

/* An error returned from here would end the daemon */
static int on_request(struct msg **msg, struct avp *avp, struct session *sess,
		      void *data, enum disp_action *act)
{
	struct request r;

	read_request(*msg, data != NULL, &r);
	if (fd_msg_new_answer_from_req(fd_g_config->cnf_dict, msg, 0)) {
		*act = DISP_ACT_ERROR;
		return 0;
	}
	if (fill_answer(*msg, &r)) {
		LOG_E("hss: cannot make an answer");
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

static int listen_to(struct dict_object *command, void *data,
		     struct disp_hdl **handler)
{
	struct disp_when when;

	memset(&when, 0, sizeof(when));
	when.app = d_app;
	when.command = command;
	return fd_disp_register(on_request, DISP_HOW_CC, &when, data, handler);
}

static int hss_entry(char *conf)
{
	static const char act[] = "act:";

	if (conf && !strncmp(conf, act, sizeof(act) - 1)) {
		by_action = 1;
		conf += sizeof(act) - 1;
	}
	if (!conf || !*conf) {
		LOG_E("hss: the configuration string must name a subscriber file");
		return EINVAL;
	}
	CHECK_FCT(load(conf));
	aes128 = EVP_CIPHER_fetch(NULL, "AES-128-ECB", NULL);
	if (!aes128)
		return ENOTSUP;
	CHECK_FCT(s6a_dict(VENDOR_OWN));
	CHECK_FCT(listen_to(d_air, &subs, &air_handler));
	CHECK_FCT(listen_to(d_ulr, NULL, &ulr_handler));
	/* also makes the application local, so that requests come to us */
	CHECK_FCT(fd_disp_app_support(d_app, d_3gpp, 1, 0));
	LOG_N("hss: %zu subscribers, answers by %s", sub_count,
	      by_action ? "DISP_ACT_SEND" : "fd_msg_send");
	return 0;
}

void fd_ext_fini(void)
{
	if (air_handler)
		fd_disp_unregister(&air_handler, NULL);
	if (ulr_handler)
		fd_disp_unregister(&ulr_handler, NULL);
	EVP_CIPHER_free(aes128);
	if (subs)
		OPENSSL_cleanse(subs, sub_room * sizeof(*subs));
	free(subs);
}

EXTENSION_ENTRY("hss", hss_entry);
