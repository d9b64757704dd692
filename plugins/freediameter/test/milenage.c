/* SPDX-License-Identifier: Apache-2.0 */
#include "milenage.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>

/* One keyed cipher and TEMP serve all functions of a RAND. */
struct milenage {
	EVP_CIPHER_CTX *aes;
	const uint8_t *opc;
	uint8_t temp[BLOCK];
};

static const uint8_t amf_resync[2] = { 0x00, 0x00 };	/* TS 33.102, 6.3.3 */

static void xor_into(uint8_t *to, const uint8_t *with, size_t size)
{
	while (size--)
		*to++ ^= *with++;
}

static int aes(struct milenage *m, const uint8_t in[BLOCK], uint8_t out[BLOCK])
{
	int size = 0;

	return EVP_EncryptUpdate(m->aes, out, &size, in, BLOCK) == 1 && size == BLOCK ? 0 : EIO;
}

static void end(struct milenage *m)
{
	EVP_CIPHER_CTX_free(m->aes);
	OPENSSL_cleanse(m, sizeof(*m));
}

static int begin(struct milenage *m, const uint8_t k[BLOCK], const uint8_t opc[BLOCK], const uint8_t rand[BLOCK])
{
	uint8_t in[BLOCK];

	m->opc = opc;
	m->aes = EVP_CIPHER_CTX_new();
	if (!m->aes)
		return ENOMEM;
	memcpy(in, rand, BLOCK);
	xor_into(in, opc, BLOCK);
	if (EVP_EncryptInit_ex(m->aes, EVP_aes_128_ecb(), NULL, k, NULL) == 1 && EVP_CIPHER_CTX_set_padding(m->aes, 0) == 1 &&
	    !aes(m, in, m->temp))
		return 0;
	end(m);
	return EIO;
}

/* OUT1: f1 is its first half, f1* its second. */
static int out1(struct milenage *m, const uint8_t sqn[SQN_SIZE], const uint8_t amf[2], uint8_t out[BLOCK])
{
	uint8_t in1[BLOCK], in[BLOCK];
	int i;

	memcpy(in1, sqn, SQN_SIZE);
	memcpy(in1 + SQN_SIZE, amf, 2);
	memcpy(in1 + 8, in1, 8);
	xor_into(in1, m->opc, BLOCK);
	for (i = 0; i < BLOCK; i++)	/* r1 = 64 bits, c1 = 0 */
		in[(i + 8) % BLOCK] = in1[i];
	xor_into(in, m->temp, BLOCK);
	if (aes(m, in, out))
		return EIO;
	xor_into(out, m->opc, BLOCK);
	return 0;
}

/* OUT2 to OUT5: the rotation in octets and the last octet of c choose which. */
static int outn(struct milenage *m, int rotate, uint8_t c, uint8_t out[BLOCK])
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

static int kasme(struct vector *v, const uint8_t plmn[PLMN_SIZE])
{
	uint8_t s[1 + PLMN_SIZE + 2 + SQN_SIZE + 2] = { 0x10 }, key[2 * BLOCK];
	unsigned int size = 0;
	int ok;

	memcpy(s + 1, plmn, PLMN_SIZE);
	s[5] = PLMN_SIZE;
	memcpy(s + 6, v->autn, SQN_SIZE);
	s[13] = SQN_SIZE;
	memcpy(key, v->ck, BLOCK);
	memcpy(key + BLOCK, v->ik, BLOCK);
	ok = HMAC(EVP_sha256(), key, sizeof(key), s, sizeof(s), v->kasme, &size) && size == KASME_SIZE;
	OPENSSL_cleanse(key, sizeof(key));
	return ok ? 0 : EIO;
}

static int fill(struct milenage *m, uint64_t sqn, int eps, struct vector *v)
{
	const uint8_t amf[2] = { eps ? 0x80 : 0x00, 0x00 };
	uint8_t two[BLOCK], mac[BLOCK], plain[SQN_SIZE];
	int i;

	for (i = SQN_SIZE - 1; i >= 0; i--, sqn >>= 8)
		plain[i] = sqn & 0xff;
	if (out1(m, plain, amf, mac) || outn(m, 0, 1, two) || outn(m, 4, 2, v->ck) || outn(m, 8, 4, v->ik))
		return EIO;
	memcpy(v->xres, two + 8, RES_SIZE);
	memcpy(v->autn, plain, SQN_SIZE);
	xor_into(v->autn, two, SQN_SIZE);	/* f5 is the head of OUT2 */
	memcpy(v->autn + SQN_SIZE, amf, 2);
	memcpy(v->autn + SQN_SIZE + 2, mac, MAC_SIZE);
	for (i = 0; i < 4; i++)
		v->sres[i] = v->xres[i] ^ v->xres[i + 4];
	for (i = 0; i < 8; i++)
		v->kc[i] = v->ck[i] ^ v->ck[i + 8] ^ v->ik[i] ^ v->ik[i + 8];
	return 0;
}

int milenage_vector(const uint8_t k[BLOCK], const uint8_t opc[BLOCK], uint64_t sqn, int eps, const uint8_t plmn[PLMN_SIZE],
		    struct vector *v)
{
	struct milenage m;
	int err = begin(&m, k, opc, v->rand);

	if (err)
		return err;
	err = fill(&m, sqn, eps, v);
	end(&m);
	return err ? err : kasme(v, plmn);
}

int milenage_open_auts(const uint8_t k[BLOCK], const uint8_t opc[BLOCK], const uint8_t info[RESYNC_SIZE], uint64_t *sqn)
{
	const uint8_t *auts = info + BLOCK;
	uint8_t five[BLOCK], mac[BLOCK], plain[SQN_SIZE];
	struct milenage m;
	int err, i;

	err = begin(&m, k, opc, info);
	if (err)
		return err;
	err = outn(&m, 12, 8, five);
	memcpy(plain, auts, SQN_SIZE);
	xor_into(plain, five, SQN_SIZE);
	if (!err)
		err = out1(&m, plain, amf_resync, mac);
	end(&m);
	if (err)
		return err;
	if (CRYPTO_memcmp(mac + 8, auts + SQN_SIZE, MAC_SIZE))
		return EPERM;
	for (*sqn = 0, i = 0; i < SQN_SIZE; i++)
		*sqn = *sqn << 8 | plain[i];
	return 0;
}
