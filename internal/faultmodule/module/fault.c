/*
 * A PKCS #11 module around another one, which fails, hangs and delays as a control file tells, and counts calls.
 *
 * KMEHSM_FAULT_MODULE is the module around which it is, KMEHSM_FAULT_CONTROL the control file, read at each call:
 *
 *     C_Decrypt 0x30       returns CKR_DEVICE_ERROR instead of calling
 *     * removed            the first such call closes all sessions, as if the token was pulled out; then as 0x32
 *     C_Sign hang          calls when the line is gone
 *     C_Sign hang-once 7   so does the first call that reads this number; the others are made
 *     * delay 1000         returns 1000 us after it was called, as an HSM at the other end of a network does, or later
 *     trivial 0x40         C_Decrypt returns CKR_ENCRYPTED_DATA_INVALID of what decrypts to itself, as 0, 1 and N-1 do
 *     kwp                  has CKM_AES_KEY_WRAP_KWP (PKCS #11 3.0) in the place of CKM_AES_KEY_WRAP_PAD
 *
 * and, of attributes in templates, as a token that does not keep keys as it should:
 *
 *     ignores C_CopyObject 0x162   makes the call as if the attribute was not in the template
 *     allows C_CopyObject 0x162    so it does, and the object says that it has the value (of a boolean attribute)
 *     refuses C_CopyObject 0x162   returns CKR_ATTRIBUTE_TYPE_INVALID
 *     tells * 0x124                has a length for the attribute, of any object
 *     allows C_WrapKey 0           returns zeros and CKR_OK, of a key that may not be wrapped
 *
 * The first line that fits counts; * is any function on a session. The last five may come many times.
 * KMEHSM_FAULT_COUNTS is a file that gets, for each function in the order of the standard's list, how often it
 * was called, as 64-bit numbers.
 *
 * It is built with GCC, whose __builtin_apply forwards a call without knowing its arguments.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "pkcs11go.h"

#define CKM_AES_KEY_WRAP_KWP 0x210BUL

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;
static _Atomic uint64_t *counts;
static _Atomic int removed;
/* No session is closed under a call on it: tokens that are pulled out see to that themselves. */
static pthread_rwlock_t calls = PTHREAD_RWLOCK_INITIALIZER;
static _Atomic unsigned long hung;

enum index {
#define CK_PKCS11_FUNCTION_INFO(name) index_##name,
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	functions
};

/* told finds the action for a function; 0 if there is none. */
static int told(const char *name, char action[32], unsigned long *value)
{
	FILE *f = fopen(getenv("KMEHSM_FAULT_CONTROL") ?: "", "r");
	char line[128], function[64];
	int found = 0;

	if (!f)
		return 0;
	while (!found && fgets(line, sizeof line, f)) {
		*value = 0;
		function[0] = action[0] = 0;
		if (sscanf(line, "%63s %31s %lu", function, action, value) < 1)
			continue;
		found = !strcmp(function, name) ||
			(!strcmp(function, "*") && strcmp(name, "C_GetFunctionList") && strcmp(name, "C_Initialize") &&
			 strcmp(name, "C_Finalize"));
	}
	fclose(f);
	return found;
}

/* The lines of attributes: VERB FUNCTION TYPE. */
struct rules {
	struct rule {
		char verb[64], function[32];
		unsigned long type;
	} rule[16];
	int count;
};

static void read_rules(struct rules *r)
{
	FILE *f = fopen(getenv("KMEHSM_FAULT_CONTROL") ?: "", "r");
	char line[128];

	r->count = 0;
	if (!f)
		return;
	while (r->count < 16 && fgets(line, sizeof line, f)) {
		struct rule *to = &r->rule[r->count];
		if (sscanf(line, "%63s %31s %li", to->verb, to->function, (long *)&to->type) == 3)
			r->count++;
	}
	fclose(f);
}

static int rules(struct rules *r, const char *verb, const char *name, CK_ATTRIBUTE_TYPE type)
{
	for (struct rule *is = r->rule; is < r->rule + r->count; is++)
		if (!strcmp(is->verb, verb) && is->type == type && (!strcmp(is->function, name) || !strcmp(is->function, "*")))
			return 1;
	return 0;
}

static _Thread_local struct timespec due; /* when the call under way is to return */

static void after(void)
{
	if (!due.tv_sec)
		return;
	prctl(PR_SET_TIMERSLACK, 1); /* else the kernel adds up to 50 us */
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
		;
	due.tv_sec = 0;
}

/* before says what a call returns without being made; CKR_OK if it is to be made. */
static CK_RV before(const char *name, enum index at)
{
	char action[32];
	unsigned long value;

	if (counts)
		counts[at]++;
	while (told(name, action, &value)) {
		if (!strcmp(action, "delay")) {
			clock_gettime(CLOCK_MONOTONIC, &due);
			due.tv_nsec += value % 1000000 * 1000;
			due.tv_sec += value / 1000000 + due.tv_nsec / 1000000000;
			due.tv_nsec %= 1000000000;
			return CKR_OK;
		}
		if (!strcmp(action, "removed")) {
			if (!removed++) {
				CK_SLOT_ID slots[64];
				CK_ULONG n = 64;
				pthread_rwlock_wrlock(&calls);
				if (real->C_GetSlotList(CK_TRUE, slots, &n) == CKR_OK)
					while (n--)
						real->C_CloseAllSessions(slots[n]);
				pthread_rwlock_unlock(&calls);
			}
			return CKR_DEVICE_REMOVED;
		}
		if (!strcmp(action, "hang-once")) {
			if (atomic_exchange(&hung, value) == value)
				return CKR_OK;
			while (told(name, action, &value) && !strcmp(action, "hang-once"))
				usleep(5000);
			return CKR_OK;
		}
		if (strcmp(action, "hang"))
			return strtoul(action, NULL, 0);
		usleep(5000);
	}
	removed = 0;
	return CKR_OK;
}

static int kwp(void)
{
	char action[32];
	unsigned long value;
	return told("kwp", action, &value);
}

static CK_RV wrap_mechanism(CK_MECHANISM_PTR given, CK_MECHANISM_PTR use)
{
	*use = *given;
	if (kwp()) {
		if (given->mechanism == CKM_AES_KEY_WRAP_PAD)
			return CKR_MECHANISM_INVALID;
		if (given->mechanism == CKM_AES_KEY_WRAP_KWP)
			use->mechanism = CKM_AES_KEY_WRAP_PAD;
	}
	return CKR_OK;
}

#define CK_PKCS11_FUNCTION_INFO(name) \
	static CK_RV fault_##name() \
	{ \
		CK_RV rv = before(#name, index_##name); \
		void *result; \
		if (rv != CKR_OK) \
			return rv; \
		pthread_rwlock_rdlock(&calls); \
		result = __builtin_apply((void (*)())real->name, __builtin_apply_args(), 128); \
		pthread_rwlock_unlock(&calls); \
		after(); \
		__builtin_return(result); \
	}
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO

/* What objects say that they are. */
static struct lie {
	CK_OBJECT_HANDLE object;
	CK_ATTRIBUTE_TYPE type;
	CK_BBOOL value;
} lies[256];
static unsigned long told_lies; /* guarded by lying, and so are they */
static pthread_mutex_t lying = PTHREAD_MUTEX_INITIALIZER;

/* A template without what is ignored or allowed. */
struct template {
	CK_ATTRIBUTE a[64];
	CK_ULONG count;
	struct lie allowed[64];
	CK_ULONG lies;
};

static CK_RV weaken(struct template *t, const char *name, CK_ATTRIBUTE_PTR a, CK_ULONG count)
{
	struct rules r;

	read_rules(&r);
	t->count = t->lies = 0;
	if (count > 64)
		return CKR_ARGUMENTS_BAD;
	for (; count--; a++) {
		if (rules(&r, "refuses", name, a->type))
			return CKR_ATTRIBUTE_TYPE_INVALID;
		if (rules(&r, "ignores", name, a->type))
			continue;
		if (rules(&r, "allows", name, a->type) && a->ulValueLen == sizeof(CK_BBOOL))
			t->allowed[t->lies++] = (struct lie){ 0, a->type, *(CK_BBOOL *)a->pValue };
		else
			t->a[t->count++] = *a;
	}
	return CKR_OK;
}

static CK_RV lie(CK_RV rv, struct template *t, const CK_OBJECT_HANDLE *object)
{
	pthread_mutex_lock(&lying);
	for (CK_ULONG i = 0; rv == CKR_OK && i < t->lies; i++) {
		t->allowed[i].object = *object;
		lies[told_lies++ % 256] = t->allowed[i];
	}
	pthread_mutex_unlock(&lying);
	return rv;
}

/* Handles begin anew. */
static CK_RV with_weak_C_Initialize(CK_VOID_PTR args)
{
	pthread_mutex_lock(&lying);
	memset(lies, 0, sizeof lies);
	pthread_mutex_unlock(&lying);
	return ((CK_C_Initialize)fault_C_Initialize)(args);
}

static CK_RV with_weak_C_CreateObject(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR o)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_CreateObject", a, n);
	return rv != CKR_OK ? rv : lie(((CK_C_CreateObject)fault_C_CreateObject)(s, t.a, t.count, o), &t, o);
}

static CK_RV with_weak_C_CopyObject(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE of, CK_ATTRIBUTE_PTR a, CK_ULONG n,
				    CK_OBJECT_HANDLE_PTR o)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_CopyObject", a, n);
	return rv != CKR_OK ? rv : lie(((CK_C_CopyObject)fault_C_CopyObject)(s, of, t.a, t.count, o), &t, o);
}

static CK_RV with_weak_C_SetAttributeValue(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o, CK_ATTRIBUTE_PTR a, CK_ULONG n)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_SetAttributeValue", a, n);
	if (rv == CKR_OK && t.count)
		rv = ((CK_C_SetAttributeValue)fault_C_SetAttributeValue)(s, o, t.a, t.count);
	return lie(rv, &t, &o);
}

static CK_RV with_weak_C_GetAttributeValue(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o, CK_ATTRIBUTE_PTR a, CK_ULONG n)
{
	struct rules r;
	CK_RV rv;

	if (n == 1 && !a->pValue) {
		read_rules(&r);
		if (rules(&r, "tells", "C_GetAttributeValue", a->type)) {
			a->ulValueLen = 32;
			return CKR_OK;
		}
	}
	rv = ((CK_C_GetAttributeValue)fault_C_GetAttributeValue)(s, o, a, n);
	pthread_mutex_lock(&lying);
	for (CK_ULONG i = 0; rv == CKR_OK && i < n; i++)
		for (int l = 0; l < 256; l++)
			if (lies[l].object == o && lies[l].type == a[i].type && a[i].pValue)
				*(CK_BBOOL *)a[i].pValue = lies[l].value;
	pthread_mutex_unlock(&lying);
	return rv;
}

static CK_RV with_weak_C_GenerateKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n,
				     CK_OBJECT_HANDLE_PTR o)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_GenerateKey", a, n);
	return rv != CKR_OK ? rv : lie(((CK_C_GenerateKey)fault_C_GenerateKey)(s, m, t.a, t.count, o), &t, o);
}

static CK_RV with_weak_C_GenerateKeyPair(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n,
					 CK_ATTRIBUTE_PTR b, CK_ULONG k, CK_OBJECT_HANDLE_PTR pub,
					 CK_OBJECT_HANDLE_PTR priv)
{
	struct template t, u;
	CK_RV rv = weaken(&t, "C_GenerateKeyPair", a, n) ?: weaken(&u, "C_GenerateKeyPair", b, k);
	if (rv != CKR_OK)
		return rv;
	rv = ((CK_C_GenerateKeyPair)fault_C_GenerateKeyPair)(s, m, t.a, t.count, u.a, u.count, pub, priv);
	return lie(lie(rv, &t, pub), &u, priv);
}

static CK_RV with_weak_C_WrapKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE w, CK_OBJECT_HANDLE k,
				 CK_BYTE_PTR out, CK_ULONG_PTR n)
{
	CK_MECHANISM use;
	struct rules r;
	CK_RV rv = wrap_mechanism(m, &use);

	if (rv == CKR_OK)
		rv = ((CK_C_WrapKey)fault_C_WrapKey)(s, &use, w, k, out, n);
	if (rv != CKR_KEY_UNEXTRACTABLE && rv != CKR_KEY_NOT_WRAPPABLE)
		return rv;
	read_rules(&r);
	if (!rules(&r, "allows", "C_WrapKey", 0))
		return rv;
	*n = 40;
	memset(out, 0, *n);
	return CKR_OK;
}

static CK_RV with_weak_C_UnwrapKey(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE u, CK_BYTE_PTR in,
				   CK_ULONG n, CK_ATTRIBUTE_PTR a, CK_ULONG count, CK_OBJECT_HANDLE_PTR k)
{
	CK_MECHANISM use;
	struct template t;
	CK_RV rv = wrap_mechanism(m, &use) ?: weaken(&t, "C_UnwrapKey", a, count);
	return rv != CKR_OK ? rv : lie(((CK_C_UnwrapKey)fault_C_UnwrapKey)(s, &use, u, in, n, t.a, t.count, k), &t, k);
}

static CK_RV with_trivial_C_Decrypt(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG n, CK_BYTE_PTR out, CK_ULONG_PTR size)
{
	char action[32];
	unsigned long value;
	CK_RV rv = ((CK_C_Decrypt)fault_C_Decrypt)(s, in, n, out, size);

	if (rv == CKR_OK && out && *size == n && !memcmp(in, out, n) && told("trivial", action, &value))
		return strtoul(action, NULL, 0);
	return rv;
}

static CK_RV with_kwp_C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
	CK_MECHANISM m = { type, NULL, 0 }, use;
	CK_RV rv = wrap_mechanism(&m, &use);
	return rv != CKR_OK ? rv : ((CK_C_GetMechanismInfo)fault_C_GetMechanismInfo)(slot, use.mechanism, info);
}

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	const char *path = getenv("KMEHSM_FAULT_COUNTS");
	CK_RV (*get)(CK_FUNCTION_LIST_PTR_PTR);
	void *module;

	if (real) {
		*out = &list;
		return CKR_OK;
	}
	module = dlopen(getenv("KMEHSM_FAULT_MODULE") ?: "", RTLD_NOW | RTLD_LOCAL);
	*(void **)&get = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (!get || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	if (path) {
		int fd = open(path, O_RDWR | O_CREAT, 0600);
		if (fd < 0 || ftruncate(fd, functions * sizeof *counts))
			return CKR_GENERAL_ERROR;
		counts = mmap(NULL, functions * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (counts == MAP_FAILED)
			return CKR_GENERAL_ERROR;
	}
	list.version = real->version;
#define CK_PKCS11_FUNCTION_INFO(name) list.name = (CK_##name)fault_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
	list.C_GetFunctionList = C_GetFunctionList;
	list.C_CreateObject = with_weak_C_CreateObject;
	list.C_CopyObject = with_weak_C_CopyObject;
	list.C_SetAttributeValue = with_weak_C_SetAttributeValue;
	list.C_GetAttributeValue = with_weak_C_GetAttributeValue;
	list.C_GenerateKey = with_weak_C_GenerateKey;
	list.C_GenerateKeyPair = with_weak_C_GenerateKeyPair;
	list.C_Initialize = with_weak_C_Initialize;
	list.C_Decrypt = with_trivial_C_Decrypt;
	list.C_WrapKey = with_weak_C_WrapKey;
	list.C_UnwrapKey = with_weak_C_UnwrapKey;
	list.C_GetMechanismInfo = with_kwp_C_GetMechanismInfo;
	*out = &list;
	return CKR_OK;
}
