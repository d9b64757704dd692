// SoftHSM with RSA key pairs whose primes are kept: to look for primes takes most of the CPU of tests that have a token
// make keys, and is OpenSSL's. All else is as ever. It is loaded in place of libsofthsm2.so, which needs it: so
// libsofthsm2.so finds this RSA_generate_key_ex and not OpenSSL's.
//
// Beside this library are BITS.primes, with two lines of hexadecimal digits for each key, and BITS.next, where the next
// key begins. Every process takes other keys; when all are used, OpenSSL makes more.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

// Of OpenSSL's bn.h and rsa.h, which make check does not need otherwise.
typedef struct bignum_st BIGNUM;
typedef struct bignum_ctx BN_CTX;
typedef struct rsa_st RSA;
int BN_hex2bn(BIGNUM **a, const char *text);
BIGNUM *BN_new(void), *BN_dup(const BIGNUM *a);
BIGNUM *BN_mod_inverse(BIGNUM *r, const BIGNUM *a, const BIGNUM *n, BN_CTX *ctx);
BN_CTX *BN_CTX_new(void);
void BN_CTX_free(BN_CTX *ctx);
int BN_mul(BIGNUM *r, const BIGNUM *a, const BIGNUM *b, BN_CTX *ctx);
int BN_div(BIGNUM *quotient, BIGNUM *remainder, const BIGNUM *a, const BIGNUM *b, BN_CTX *ctx);
int BN_sub_word(BIGNUM *a, unsigned long w);
int RSA_set0_key(RSA *r, BIGNUM *n, BIGNUM *e, BIGNUM *d);
int RSA_set0_factors(RSA *r, BIGNUM *p, BIGNUM *q);
int RSA_set0_crt_params(RSA *r, BIGNUM *dmp1, BIGNUM *dmq1, BIGNUM *iqmp);

// beside opens a file of this library's folder.
static FILE *beside(int bits, const char *name, const char *mode)
{
	Dl_info own;
	char path[4096];
	if (dladdr((void *)beside, &own) == 0)
		return NULL;
	const char *end = strrchr(own.dli_fname, '/');
	int length = end == NULL ? 0 : (int)(end + 1 - own.dli_fname);
	snprintf(path, sizeof(path), "%.*s%d.%s", length, own.dli_fname, bits, name);
	return fopen(path, mode);
}

// take takes the primes of the next key; it gives 0 when there are none.
static int take(int bits, BIGNUM **p, BIGNUM **q)
{
	char line[2][1026];
	FILE *primes = beside(bits, "primes", "r"), *next = beside(bits, "next", "r+");
	int taken = 0;
	if (primes != NULL && next != NULL && flock(fileno(next), LOCK_EX) == 0) {
		long at = 0;
		if (fscanf(next, "%ld", &at) != 1)
			at = 0;
		if (fseek(primes, at, SEEK_SET) == 0 && fscanf(primes, "%1025s %1025s", line[0], line[1]) == 2) {
			rewind(next);
			fprintf(next, "%ld\n", ftell(primes));
			taken = fflush(next) == 0 && BN_hex2bn(p, line[0]) > 0 && BN_hex2bn(q, line[1]) > 0;
		}
	}
	if (primes != NULL)
		fclose(primes);
	if (next != NULL)
		fclose(next);
	return taken;
}

int RSA_generate_key_ex(RSA *rsa, int bits, BIGNUM *e, void *callback)
{
	BIGNUM *p = NULL, *q = NULL;
	if (!take(bits, &p, &q)) {
		int (*openssl)(RSA *, int, BIGNUM *, void *) = dlsym(RTLD_NEXT, "RSA_generate_key_ex");
		return openssl != NULL && openssl(rsa, bits, e, callback);
	}
	BN_CTX *ctx = BN_CTX_new();
	BIGNUM *p1 = BN_dup(p), *q1 = BN_dup(q), *n = BN_new(), *order = BN_new(), *dp = BN_new(), *dq = BN_new();
	int done = BN_sub_word(p1, 1) && BN_sub_word(q1, 1) && BN_mul(n, p, q, ctx) && BN_mul(order, p1, q1, ctx);
	BIGNUM *d = BN_mod_inverse(NULL, e, order, ctx), *inverse = BN_mod_inverse(NULL, q, p, ctx);
	done = done && d != NULL && inverse != NULL && BN_div(NULL, dp, d, p1, ctx) && BN_div(NULL, dq, d, q1, ctx) &&
		RSA_set0_key(rsa, n, BN_dup(e), d) && RSA_set0_factors(rsa, p, q) &&
		RSA_set0_crt_params(rsa, dp, dq, inverse);
	BN_CTX_free(ctx);
	return done;
}
