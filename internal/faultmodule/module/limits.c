/* Limits, and decryptions: see fault.c. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"

/* What was decrypted, for "replay": of more than 16 that fall on one place, the last. */
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
	figure_is(now_sessions, open_sessions);
	figure_is(now_objects, live_objects);
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

void all_closed(void)
{
	pthread_mutex_lock(&limiting);
	open_sessions = live_objects = 0;
	changed();
}

void forget_answers(void)
{
	pthread_mutex_lock(&answering);
	memset(answers, 0, sizeof answers);
	pthread_mutex_unlock(&answering);
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
CK_RV full(void)
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
CK_RV made(CK_RV rv, CK_SESSION_HANDLE s, struct template *t, const CK_OBJECT_HANDLE *o)
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
	for (int i = 0; i < 16; i++) {
		struct answer *a = &answers[(h + i) % 4096];
		if (!a->size || (a->key == key && a->size == n && !memcmp(a->in, in, n)))
			return a;
	}
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

void limited_functions(CK_FUNCTION_LIST_PTR list)
{
	list->C_Finalize = with_limits_C_Finalize;
	list->C_GetTokenInfo = with_limits_C_GetTokenInfo;
	list->C_OpenSession = with_limits_C_OpenSession;
	list->C_CloseSession = with_limits_C_CloseSession;
	list->C_CloseAllSessions = with_limits_C_CloseAllSessions;
	list->C_DestroyObject = with_limits_C_DestroyObject;
	list->C_DecryptInit = with_network_C_DecryptInit;
	list->C_Decrypt = with_network_C_Decrypt;
}
