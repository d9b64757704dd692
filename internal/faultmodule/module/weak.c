/* Attributes: see fault.c. */
#include <pthread.h>
#include <string.h>

#include "fault.h"

/* What objects say that they are. */
static struct lie lies[256];
static unsigned long told_lies; /* guarded by lying, and so are they */
static pthread_mutex_t lying = PTHREAD_MUTEX_INITIALIZER;

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

CK_RV lie(CK_RV rv, struct template *t, const CK_OBJECT_HANDLE *object)
{
	pthread_mutex_lock(&lying);
	for (CK_ULONG i = 0; rv == CKR_OK && i < t->lies; i++) {
		t->allowed[i].object = *object;
		lies[told_lies++ % 256] = t->allowed[i];
	}
	pthread_mutex_unlock(&lying);
	return rv;
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

/* Handles begin anew. */
static CK_RV with_weak_C_Initialize(CK_VOID_PTR args)
{
	pthread_mutex_lock(&lying);
	memset(lies, 0, sizeof lies);
	pthread_mutex_unlock(&lying);
	forget_answers();
	return ((CK_C_Initialize)fault_C_Initialize)(args);
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

static CK_RV with_kwp_C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info)
{
	CK_MECHANISM m = { type, NULL, 0 }, use;
	CK_RV rv = wrap_mechanism(&m, &use);
	return rv != CKR_OK ? rv : ((CK_C_GetMechanismInfo)fault_C_GetMechanismInfo)(slot, use.mechanism, info);
}

void weak_functions(CK_FUNCTION_LIST_PTR list)
{
	list->C_CreateObject = with_weak_C_CreateObject;
	list->C_CopyObject = with_weak_C_CopyObject;
	list->C_SetAttributeValue = with_weak_C_SetAttributeValue;
	list->C_GetAttributeValue = with_weak_C_GetAttributeValue;
	list->C_GenerateKey = with_weak_C_GenerateKey;
	list->C_GenerateKeyPair = with_weak_C_GenerateKeyPair;
	list->C_Initialize = with_weak_C_Initialize;
	list->C_WrapKey = with_weak_C_WrapKey;
	list->C_UnwrapKey = with_weak_C_UnwrapKey;
	list->C_GetMechanismInfo = with_kwp_C_GetMechanismInfo;
}
