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
 * and, of all calls, as a network HSM with limits of its own, which is as strict as the module that it is around:
 *
 *     network 1000 5000 1000   returns 1000 us after it took the call, of which it takes 5000 a second, and of raw RSA
 *                              decryptions 1000 a second; the others wait. 0 for no limit
 *     replay                   C_Decrypt gives what it has computed before of the same ciphertext, without computing
 *     limits 16 65536          allows 16 sessions and 64 session objects of 1024 bytes, and says so in C_GetTokenInfo
 *
 * The first line that fits counts; * is any function on a session. Those of attributes may come many times.
 * KMEHSM_FAULT_COUNTS is a file that gets, for each function in the order of the standard's list, how often it
 * was called, as 64-bit numbers; and after them the figures of enum figure.
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
#include <sys/stat.h>
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

/* What the module counts beside calls. */
enum figure {
	longest,       /* how many calls came one after the other: each began when the one before had ended */
	decryptions,   /* of "network", which took a turn of those */
	replayed,      /* that were not computed */
	idle_ns,       /* how long "network" could have taken another call, and there was none */
	most_sessions, /* that were open at a time */
	most_objects,  /* session objects that were there at a time */
	refused,       /* sessions and objects, by "limits" */
	now_sessions,  /* that are open */
	now_objects,   /* session objects that are there */
	figures
};

static void count(enum figure f, uint64_t n)
{
	if (counts)
		counts[functions + f] += n;
}

static void at_least(enum figure f, uint64_t n)
{
	if (!counts)
		return;
	for (uint64_t is = counts[functions + f]; is < n; )
		if (atomic_compare_exchange_weak(&counts[functions + f], &is, n))
			return;
}

/* open_control gives the control file, which each thread reads when it has changed; NULL if there is nothing in it. */
static FILE *open_control(void)
{
	static _Thread_local struct stat was;
	static _Thread_local char text[4096];
	static _Thread_local size_t size;
	const char *path = getenv("KMEHSM_FAULT_CONTROL") ?: "";
	struct stat is;

	if (stat(path, &is))
		return NULL;
	if (is.st_ino != was.st_ino || is.st_size != was.st_size || is.st_mtim.tv_sec != was.st_mtim.tv_sec ||
	    is.st_mtim.tv_nsec != was.st_mtim.tv_nsec) {
		FILE *f = fopen(path, "r");
		if (!f)
			return NULL;
		size = fread(text, 1, sizeof text, f);
		fclose(f);
		was = is;
	}
	return size ? fmemopen(text, size, "r") : NULL;
}

/* told finds the action for a function; 0 if there is none. */
static int told(const char *name, char action[32], unsigned long *value)
{
	FILE *f = open_control();
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
	FILE *f = open_control();
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

/* settings finds the numbers of a line that has a name and n of them; 0 if there is none. */
static int settings(const char *name, int n, unsigned long value[3])
{
	FILE *f = open_control();
	char line[128], is[64];
	int found = 0;

	if (!f)
		return 0;
	while (!found && fgets(line, sizeof line, f))
		found = sscanf(line, "%63s %lu %lu %lu", is, &value[0], &value[1], &value[2]) == 1 + n && !strcmp(is, name);
	fclose(f);
	return found;
}

static _Thread_local struct timespec due; /* when the call under way is to return */
static _Thread_local int decrypting;      /* the call under way is an RSA decryption */

/* network says when a call returns that was made now. */
static void network(void)
{
	static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
	static int64_t next, next_decryption; /* when the next call may begin; guarded by turn */
	unsigned long v[3];
	struct timespec t;
	int64_t begins;

	if (!settings("network", 3, v))
		return;
	pthread_mutex_lock(&turn);
	clock_gettime(CLOCK_MONOTONIC, &t);
	begins = t.tv_sec * 1000000000LL + t.tv_nsec;
	if (v[1]) {
		if (next && next < begins)
			count(idle_ns, begins - next);
		begins = next > begins ? next : begins;
		next = begins + 1000000000 / v[1];
	}
	if (decrypting && v[2]) {
		begins = next_decryption > begins ? next_decryption : begins;
		next_decryption = begins + 1000000000 / v[2];
		count(decryptions, 1);
	}
	pthread_mutex_unlock(&turn);
	begins += v[0] * 1000LL;
	due.tv_sec = begins / 1000000000;
	due.tv_nsec = begins % 1000000000;
}

static void after(void)
{
	if (!due.tv_sec)
		return;
	prctl(PR_SET_TIMERSLACK, 1); /* else the kernel adds up to 50 us */
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
		;
	due.tv_sec = 0;
}

static void all_closed(void);

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
				all_closed();
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
	network();
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
		uint64_t chain = counts ? counts[functions + longest] : 0; \
		CK_RV rv = before(#name, index_##name); \
		void *result; \
		if (rv != CKR_OK) \
			return rv; \
		pthread_rwlock_rdlock(&calls); \
		result = __builtin_apply((void (*)())real->name, __builtin_apply_args(), 128); \
		pthread_rwlock_unlock(&calls); \
		after(); \
		at_least(longest, chain + 1); \
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

/* What was decrypted, for "replay": of two that fall on one place, the later. */
static struct answer {
	CK_OBJECT_HANDLE key;
	CK_ULONG size;
	CK_BYTE in[512], out[512];
} answers[4096]; /* guarded by answering */
static pthread_mutex_t answering = PTHREAD_MUTEX_INITIALIZER;

enum { most_of_all = 65536, object_size = 1024 };

/* The sessions that are open, and the session objects, for "limits"; and what is to be decrypted in a session. */
static struct session {
	CK_SESSION_HANDLE session;
	CK_MECHANISM_TYPE mechanism;
	CK_OBJECT_HANDLE key;
} sessions[most_of_all];
static struct { CK_OBJECT_HANDLE object; CK_SESSION_HANDLE session; } objects[most_of_all];
static unsigned long open_sessions, live_objects; /* guarded by limiting, as what they count is */
static pthread_mutex_t limiting = PTHREAD_MUTEX_INITIALIZER;

/* changed lets go of limiting, after a change of what it guards: the figures follow. */
static void changed(void)
{
	if (counts) {
		counts[functions + now_sessions] = open_sessions;
		counts[functions + now_objects] = live_objects;
	}
	at_least(most_sessions, open_sessions);
	at_least(most_objects, live_objects);
	pthread_mutex_unlock(&limiting);
}

/* forget takes out the objects of a session, or one object; 0 for any. The caller holds limiting. */
static void forget(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o)
{
	unsigned long left = 0;

	for (unsigned long i = 0; i < live_objects; i++)
		if ((s && objects[i].session != s) || (o && objects[i].object != o))
			objects[left++] = objects[i];
	live_objects = left;
}

static void all_closed(void)
{
	pthread_mutex_lock(&limiting);
	open_sessions = live_objects = 0;
	changed();
}

/* Handles begin anew. */
static CK_RV with_weak_C_Initialize(CK_VOID_PTR args)
{
	pthread_mutex_lock(&lying);
	memset(lies, 0, sizeof lies);
	pthread_mutex_unlock(&lying);
	pthread_mutex_lock(&answering);
	memset(answers, 0, sizeof answers);
	pthread_mutex_unlock(&answering);
	return ((CK_C_Initialize)fault_C_Initialize)(args);
}

static CK_RV with_limits_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
	unsigned long v[3];
	CK_RV rv = ((CK_C_GetTokenInfo)fault_C_GetTokenInfo)(slot, info);

	if (rv == CKR_OK && settings("limits", 2, v)) {
		pthread_mutex_lock(&limiting);
		info->ulMaxSessionCount = info->ulMaxRwSessionCount = v[0];
		info->ulSessionCount = info->ulRwSessionCount = open_sessions;
		info->ulTotalPublicMemory = v[1];
		info->ulFreePublicMemory = v[1] - live_objects * object_size;
		pthread_mutex_unlock(&limiting);
	}
	return rv;
}

static CK_RV with_limits_C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR data, CK_NOTIFY notify,
				       CK_SESSION_HANDLE_PTR s)
{
	unsigned long v[3], limit = settings("limits", 2, v) ? v[0] : most_of_all;
	CK_RV rv = CKR_SESSION_COUNT;

	pthread_mutex_lock(&limiting);
	if (open_sessions < limit) { /* reserved, while the call is made */
		sessions[open_sessions++].session = 0;
		rv = CKR_OK;
	} else {
		count(refused, 1);
	}
	pthread_mutex_unlock(&limiting);
	if (rv != CKR_OK)
		return rv;
	rv = ((CK_C_OpenSession)fault_C_OpenSession)(slot, flags, data, notify, s);
	pthread_mutex_lock(&limiting);
	for (unsigned long i = 0; i < open_sessions; i++) {
		if (sessions[i].session)
			continue;
		sessions[i] = rv == CKR_OK ? (struct session){ *s, 0, 0 } : sessions[--open_sessions];
		break;
	}
	changed();
	return rv;
}

static CK_RV with_limits_C_CloseSession(CK_SESSION_HANDLE s)
{
	CK_RV rv = ((CK_C_CloseSession)fault_C_CloseSession)(s);

	pthread_mutex_lock(&limiting);
	for (unsigned long i = 0; rv == CKR_OK && i < open_sessions; i++)
		if (sessions[i].session == s) {
			sessions[i] = sessions[--open_sessions];
			forget(s, 0);
			break;
		}
	changed();
	return rv;
}

static CK_RV with_limits_C_CloseAllSessions(CK_SLOT_ID slot)
{
	CK_RV rv = ((CK_C_CloseAllSessions)fault_C_CloseAllSessions)(slot);

	if (rv == CKR_OK)
		all_closed();
	return rv;
}

static CK_RV with_limits_C_Finalize(CK_VOID_PTR reserved)
{
	CK_RV rv = ((CK_C_Finalize)fault_C_Finalize)(reserved);

	if (rv == CKR_OK)
		all_closed();
	return rv;
}

static CK_RV with_limits_C_DestroyObject(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o)
{
	CK_RV rv = ((CK_C_DestroyObject)fault_C_DestroyObject)(s, o);

	pthread_mutex_lock(&limiting);
	if (rv == CKR_OK)
		forget(0, o);
	changed();
	return rv;
}

/* full says whether there is no room for another object. */
static CK_RV full(void)
{
	unsigned long v[3], limit = settings("limits", 2, v) ? v[1] / object_size : most_of_all;
	CK_RV rv = CKR_OK;

	pthread_mutex_lock(&limiting);
	if (live_objects >= limit) {
		count(refused, 1);
		rv = CKR_DEVICE_MEMORY;
	}
	pthread_mutex_unlock(&limiting);
	return rv;
}

/* made enters an object of a session, if it is one. */
static CK_RV made(CK_RV rv, CK_SESSION_HANDLE s, struct template *t, const CK_OBJECT_HANDLE *o)
{
	for (CK_ULONG i = 0; i < t->count; i++)
		if (t->a[i].type == CKA_TOKEN && *(CK_BBOOL *)t->a[i].pValue)
			return lie(rv, t, o);
	pthread_mutex_lock(&limiting);
	if (rv == CKR_OK && live_objects < most_of_all) {
		objects[live_objects].object = *o;
		objects[live_objects++].session = s;
	}
	changed();
	return lie(rv, t, o);
}

static CK_RV with_weak_C_CreateObject(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR o)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_CreateObject", a, n) ?: full();
	return rv != CKR_OK ? rv : made(((CK_C_CreateObject)fault_C_CreateObject)(s, t.a, t.count, o), s, &t, o);
}

static CK_RV with_weak_C_CopyObject(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE of, CK_ATTRIBUTE_PTR a, CK_ULONG n,
				    CK_OBJECT_HANDLE_PTR o)
{
	struct template t;
	CK_RV rv = weaken(&t, "C_CopyObject", a, n) ?: full();
	return rv != CKR_OK ? rv : made(((CK_C_CopyObject)fault_C_CopyObject)(s, of, t.a, t.count, o), s, &t, o);
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
	CK_RV rv = weaken(&t, "C_GenerateKey", a, n) ?: full();
	return rv != CKR_OK ? rv : made(((CK_C_GenerateKey)fault_C_GenerateKey)(s, m, t.a, t.count, o), s, &t, o);
}

static CK_RV with_weak_C_GenerateKeyPair(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n,
					 CK_ATTRIBUTE_PTR b, CK_ULONG k, CK_OBJECT_HANDLE_PTR pub,
					 CK_OBJECT_HANDLE_PTR priv)
{
	struct template t, u;
	CK_RV rv = weaken(&t, "C_GenerateKeyPair", a, n) ?: weaken(&u, "C_GenerateKeyPair", b, k) ?: full();
	if (rv != CKR_OK)
		return rv;
	rv = ((CK_C_GenerateKeyPair)fault_C_GenerateKeyPair)(s, m, t.a, t.count, u.a, u.count, pub, priv);
	return made(made(rv, s, &t, pub), s, &u, priv);
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
	CK_RV rv = wrap_mechanism(m, &use) ?: weaken(&t, "C_UnwrapKey", a, count) ?: full();
	return rv != CKR_OK ? rv : made(((CK_C_UnwrapKey)fault_C_UnwrapKey)(s, &use, u, in, n, t.a, t.count, k), s, &t, k);
}

static CK_RV with_network_C_DecryptInit(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE key)
{
	CK_RV rv = ((CK_C_DecryptInit)fault_C_DecryptInit)(s, m, key);

	pthread_mutex_lock(&limiting);
	for (unsigned long i = 0; rv == CKR_OK && i < open_sessions; i++)
		if (sessions[i].session == s)
			sessions[i] = (struct session){ s, m->mechanism, key };
	pthread_mutex_unlock(&limiting);
	return rv;
}

static struct answer *answer_of(CK_OBJECT_HANDLE key, const CK_BYTE *in, CK_ULONG n)
{
	uint64_t h = 14695981039346656037ULL ^ key; /* FNV-1a */

	for (CK_ULONG i = 0; i < n; i++)
		h = (h ^ in[i]) * 1099511628211ULL;
	return &answers[h % 4096];
}

/* An RSA decryption takes its turn of "network", and is computed once if it may be replayed. */
static CK_RV with_network_C_Decrypt(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG n, CK_BYTE_PTR out,
				    CK_ULONG_PTR size)
{
	struct answer is = { 0 };
	struct session of = { 0 };
	char action[32];
	unsigned long value;
	CK_RV rv;

	pthread_mutex_lock(&limiting);
	for (unsigned long i = 0; i < open_sessions; i++)
		if (sessions[i].session == s)
			of = sessions[i];
	pthread_mutex_unlock(&limiting);
	decrypting = of.mechanism == CKM_RSA_X_509;
	if (decrypting && out && in && n <= sizeof is.in && *size >= n && told("replay", action, &value)) {
		pthread_mutex_lock(&answering);
		is = *answer_of(of.key, in, n);
		pthread_mutex_unlock(&answering);
	}
	if (is.size == n && is.key == of.key && !memcmp(is.in, in, n)) {
		/* The operation ends with what is no ciphertext, which takes no time; unless there is none. */
		CK_BYTE none[512];
		CK_ULONG room = sizeof none;
		rv = ((CK_C_Decrypt)fault_C_Decrypt)(s, in, 1, none, &room);
		decrypting = 0;
		if (rv != CKR_GENERAL_ERROR && rv != CKR_ENCRYPTED_DATA_LEN_RANGE && rv != CKR_ENCRYPTED_DATA_INVALID)
			return rv;
		memcpy(out, is.out, *size = n);
		count(replayed, 1);
		return CKR_OK;
	}
	rv = ((CK_C_Decrypt)fault_C_Decrypt)(s, in, n, out, size);
	if (rv == CKR_OK && decrypting && out && *size == n && n <= sizeof is.in) {
		is = (struct answer){ .key = of.key, .size = n };
		memcpy(is.in, in, n);
		memcpy(is.out, out, n);
		pthread_mutex_lock(&answering);
		*answer_of(of.key, in, n) = is;
		pthread_mutex_unlock(&answering);
	}
	decrypting = 0;
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
		if (fd < 0 || ftruncate(fd, (functions + figures) * sizeof *counts))
			return CKR_GENERAL_ERROR;
		counts = mmap(NULL, (functions + figures) * sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
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
	list.C_Finalize = with_limits_C_Finalize;
	list.C_GetTokenInfo = with_limits_C_GetTokenInfo;
	list.C_OpenSession = with_limits_C_OpenSession;
	list.C_CloseSession = with_limits_C_CloseSession;
	list.C_CloseAllSessions = with_limits_C_CloseAllSessions;
	list.C_DestroyObject = with_limits_C_DestroyObject;
	list.C_DecryptInit = with_network_C_DecryptInit;
	list.C_Decrypt = with_network_C_Decrypt;
	list.C_WrapKey = with_weak_C_WrapKey;
	list.C_UnwrapKey = with_weak_C_UnwrapKey;
	list.C_GetMechanismInfo = with_kwp_C_GetMechanismInfo;
	*out = &list;
	return CKR_OK;
}
