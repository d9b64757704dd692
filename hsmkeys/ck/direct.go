package ck

/*
typedef unsigned long ck;
typedef struct { ck mechanism; void *parameter; ck length; } ck_mechanism;
typedef struct { ck type; void *value; ck length; } ck_attribute;

// A call that begins an operation, and one that does all of it in one part.
typedef ck (*ck_init)(ck session, ck_mechanism *, ck key);
typedef ck (*ck_single)(ck session, unsigned char *in, ck in_size, unsigned char *out, ck *out_size);

// CK_FUNCTION_LIST of PKCS #11 2.40, with which those of later versions begin. Only the functions that are called here
// have their types.
typedef struct {
	unsigned char version[2];
	void *before_create_object[20];
	ck (*create_object)(ck session, ck_attribute *, ck count, ck *object);
	void *before_get_attribute_value[3];
	ck (*get_attribute_value)(ck session, ck object, ck_attribute *, ck count);
	void *before_encrypt_init[4];
	ck_init encrypt_init;
	ck_single encrypt;
	void *before_decrypt_init[2];
	ck_init decrypt_init;
	ck_single decrypt;
	void *before_sign_init[7];
	ck_init sign_init;
	ck_single sign;
	void *before_verify_init[4];
	ck_init verify_init;
	ck (*verify)(ck session, unsigned char *data, ck size, unsigned char *signature, ck signature_size);
	void *before_generate_key[8];
	ck (*generate_key)(ck session, ck_mechanism *, ck_attribute *, ck count, ck *key);
	ck (*generate_key_pair)(ck session, ck_mechanism *, ck_attribute *public, ck public_count,
		ck_attribute *private, ck private_count, ck *public_key, ck *private_key);
	ck (*wrap_key)(ck session, ck_mechanism *, ck wrapping, ck key, unsigned char *out, ck *out_size);
	ck (*unwrap_key)(ck session, ck_mechanism *, ck unwrapping, unsigned char *in, ck in_size,
		ck_attribute *, ck count, ck *key);
	void *after_unwrap_key[6];
} ck_list;
_Static_assert(sizeof(ck_list) == 69 * sizeof(void *), "a version and 68 functions");

enum { max_attributes = 32 };

// RSA-OAEP with SHA-1 and MGF1-SHA-1, CK_RSA_PKCS_OAEP_PARAMS.
enum { ckm_rsa_pkcs_oaep = 9 };
static struct { ck hash, mgf, source; void *label; ck size; } oaep = { 0x220, 1, 1, 0, 0 };

static ck_mechanism mechanism(ck m)
{
	if (m == ckm_rsa_pkcs_oaep)
		return (ck_mechanism){ m, &oaep, sizeof oaep };
	return (ck_mechanism){ m, 0, 0 };
}

// A template with the members of its array attributes. Go passes a row for each attribute (type, size, number of
// members), and all values one after the other. The members of an array attribute follow it.
typedef struct { ck_attribute a[max_attributes], member[max_attributes]; ck count; } ck_template;

static void template(ck_template *t, const ck *shape, ck rows, unsigned char *values)
{
	ck_attribute *a = t->a, *member = t->member;
	ck members = 0;
	for (const ck *s = shape; s < shape + 3 * rows; values += s[1], s += 3) {
		if (members) {
			*member++ = (ck_attribute){ s[0], values, s[1] };
			members--;
		} else if ((members = s[2])) {
			*a++ = (ck_attribute){ s[0], member, members * sizeof *member };
		} else {
			*a++ = (ck_attribute){ s[0], values, s[1] };
		}
	}
	t->count = a - t->a;
}

enum { encrypting, decrypting, signing };

static ck crypt(ck_list *list, int operation, ck session, ck m, ck key,
	unsigned char *in, ck in_size, unsigned char *out, ck *out_size)
{
	ck_init init = operation == encrypting ? list->encrypt_init
		: operation == decrypting ? list->decrypt_init : list->sign_init;
	ck_single single = operation == encrypting ? list->encrypt : operation == decrypting ? list->decrypt : list->sign;
	ck_mechanism how = mechanism(m);
	ck rv = init(session, &how, key);
	return rv ? rv : single(session, in, in_size, out, out_size);
}

static ck verify(ck_list *list, ck session, ck m, ck key, unsigned char *data, ck size, unsigned char *signature,
	ck signature_size)
{
	ck_mechanism how = mechanism(m);
	ck rv = list->verify_init(session, &how, key);
	return rv ? rv : list->verify(session, data, size, signature, signature_size);
}

static ck wrap(ck_list *list, ck session, ck m, ck wrapping, ck key, unsigned char *out, ck *out_size)
{
	ck_mechanism how = mechanism(m);
	return list->wrap_key(session, &how, wrapping, key, out, out_size);
}

static ck create(ck_list *list, ck session, const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_template t;
	template(&t, shape, rows, values);
	return list->create_object(session, t.a, t.count, object);
}

static ck generate(ck_list *list, ck session, ck m, const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_mechanism how = mechanism(m);
	ck_template t;
	template(&t, shape, rows, values);
	return list->generate_key(session, &how, t.a, t.count, object);
}

static ck generate_pair(ck_list *list, ck session, ck m, const ck *shape, ck rows, unsigned char *values,
	const ck *private_shape, ck private_rows, unsigned char *private_values, ck *public, ck *private)
{
	ck_mechanism how = mechanism(m);
	ck_template t, p;
	template(&t, shape, rows, values);
	template(&p, private_shape, private_rows, private_values);
	return list->generate_key_pair(session, &how, t.a, t.count, p.a, p.count, public, private);
}

static ck unwrap(ck_list *list, ck session, ck m, ck unwrapping, unsigned char *in, ck in_size,
	const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_mechanism how = mechanism(m);
	ck_template t;
	template(&t, shape, rows, values);
	return list->unwrap_key(session, &how, unwrapping, in, in_size, t.a, t.count, object);
}

static ck attribute_size(ck_list *list, ck session, ck object, ck type, ck *size)
{
	ck_attribute a = { type, 0, 0 };
	ck rv = list->get_attribute_value(session, object, &a, 1);
	*size = a.length;
	return rv;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"reflect"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// The calls that do not use miekg/pkcs11: those that make objects, since it cannot express a template within a
// template; and those of every payload and every device key. It asks the token for the size of each result first, which
// is one more round trip to a network HSM, and doubles the work of C_WrapKey in SoftHSM; and it frees its copies of
// secrets without wiping them. See docs/decisions/0012-direct-calls.md.

// Functions is a module's function list.
type Functions = *C.ck_list

// FunctionsOf gives miekg/pkcs11's function list of the module, by reflection on an unexported field. The module cannot
// be asked for it: p11-kit's client and its proxy return a new list each time, which does not know the sessions of the
// others. (SoftHSM and NSS softoken would return the same one.)
func FunctionsOf(module *pkcs11.Ctx) (Functions, error) {
	if ctx := reflect.ValueOf(module).Elem().FieldByName("ctx"); ctx.Kind() == reflect.Pointer {
		if sym := ctx.Elem().FieldByName("sym"); sym.Kind() == reflect.Pointer && !sym.IsNil() {
			return (Functions)(sym.UnsafePointer()), nil
		}
	}
	return nil, errors.New("this version of miekg/pkcs11 keeps the module's functions elsewhere than 1.1.2 does")
}

func toError(rv C.ck) error {
	if rv == pkcs11.CKR_OK {
		return nil
	}
	return pkcs11.Error(rv)
}

// crypt makes the two calls of a single-part operation. out has room for the result.
func (s *Session) crypt(
	operation C.int, mechanism uint, key pkcs11.ObjectHandle, in, out []byte,
) ([]byte, error) {
	size := C.ck(len(out))
	rv := C.crypt(s.functions, operation, C.ck(s.ID), C.ck(mechanism), C.ck(key),
		(*C.uchar)(unsafe.SliceData(in)), C.ck(len(in)), (*C.uchar)(unsafe.SliceData(out)), &size)
	if err := toError(rv); err != nil {
		return nil, err
	}
	return written(out, uint(size))
}

// written is the part of out that the token says it wrote.
func written(out []byte, size uint) ([]byte, error) {
	if size > uint(len(out)) {
		return nil, errors.New("the token says that it wrote more than there was room for")
	}
	return out[:size], nil
}

// Encrypt, Decrypt and Sign are operations in one part. out has room for the result.
func (s *Session) Encrypt(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.encrypting, mechanism, key, in, out)
}

func (s *Session) Decrypt(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.decrypting, mechanism, key, in, out)
}

func (s *Session) Sign(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.signing, mechanism, key, in, out)
}

// Verify says whether a signature is that of data.
func (s *Session) Verify(mechanism uint, key pkcs11.ObjectHandle, data, sig []byte) (bool, error) {
	// Tokens refuse NULL even for empty data (CKR_ARGUMENTS_BAD).
	none := []byte{0}
	from := func(b []byte) *C.uchar {
		if len(b) == 0 {
			b = none
		}
		return (*C.uchar)(unsafe.SliceData(b))
	}
	err := toError(C.verify(s.functions, C.ck(s.ID), C.ck(mechanism), C.ck(key), from(data), C.ck(len(data)), from(sig),
		C.ck(len(sig))))
	if IsCKR(err, pkcs11.CKR_SIGNATURE_INVALID, pkcs11.CKR_SIGNATURE_LEN_RANGE) {
		return false, nil
	}
	return err == nil, err
}

// Wrap wraps a key. out has room for the result.
func (s *Session) Wrap(mechanism uint, wrapping, key pkcs11.ObjectHandle, out []byte) ([]byte, error) {
	size := C.ck(len(out))
	rv := C.wrap(s.functions, C.ck(s.ID), C.ck(mechanism), C.ck(wrapping), C.ck(key), (*C.uchar)(unsafe.SliceData(out)),
		&size)
	if err := toError(rv); err != nil {
		return nil, err
	}
	return written(out, uint(size))
}

// ckfArrayAttribute is in the types of array attributes (PKCS #11 v2.40 section 4.1).
const ckfArrayAttribute = 0x40000000

// shape is a template as C takes it: type, size and number of members of each attribute, and all values one after the
// other. The values are copies, and may be secret.
func shape(a Attributes) (rows []C.ck, values []byte, err error) {
	if len(a) > C.max_attributes {
		return nil, nil, fmt.Errorf("a template of %d attributes: there is room for %d, see max_attributes",
			len(a), C.max_attributes)
	}
	size := 0
	for _, e := range a {
		size += len(e.Value)
	}
	rows, values = make([]C.ck, 0, 3*C.max_attributes), make([]byte, 0, size)
	for _, e := range a {
		if e.Type&ckfArrayAttribute != 0 && e.Type != pkcs11.CKA_ALLOWED_MECHANISMS {
			rows = append(rows, C.ck(e.Type), 0, C.ck(e.Value[0]))
			continue
		}
		rows = append(rows, C.ck(e.Type), C.ck(len(e.Value)), 0)
		values = append(values, e.Value...)
	}
	return rows, values, nil
}

// object makes an object by a template, as call makes it: with the template as C takes it. The copies of its values are
// wiped.
func (s *Session) object(
	a Attributes, call func(shape *C.ck, rows C.ck, values *C.uchar, object *C.ck) C.ck,
) (pkcs11.ObjectHandle, error) {
	return s.Fitting(a, func(a Attributes) (pkcs11.ObjectHandle, error) {
		rows, values, err := shape(a)
		if err != nil {
			return 0, err
		}
		defer clear(values)
		var h C.ck
		rv := call(unsafe.SliceData(rows), C.ck(len(rows)/3), (*C.uchar)(unsafe.SliceData(values)), &h)
		return pkcs11.ObjectHandle(h), toError(rv)
	})
}

// Create makes an object.
func (s *Session) Create(a Attributes) (pkcs11.ObjectHandle, error) {
	return s.object(a, func(shape *C.ck, rows C.ck, values *C.uchar, h *C.ck) C.ck {
		return C.create(s.functions, C.ck(s.ID), shape, rows, values, h)
	})
}

// Generate makes a secret key.
func (s *Session) Generate(mechanism uint, a Attributes) (pkcs11.ObjectHandle, error) {
	return s.object(a, func(shape *C.ck, rows C.ck, values *C.uchar, h *C.ck) C.ck {
		return C.generate(s.functions, C.ck(s.ID), C.ck(mechanism), shape, rows, values, h)
	})
}

// GeneratePair makes a key pair.
func (s *Session) GeneratePair(mechanism uint, public, private Attributes) (pub, priv pkcs11.ObjectHandle, err error) {
	rows, values, err := shape(public)
	if err != nil {
		return 0, 0, err
	}
	var h C.ck
	priv, err = s.object(private, func(shape *C.ck, privateRows C.ck, privateValues *C.uchar, k *C.ck) C.ck {
		return C.generate_pair(s.functions, C.ck(s.ID), C.ck(mechanism), unsafe.SliceData(rows), C.ck(len(rows)/3),
			(*C.uchar)(unsafe.SliceData(values)), shape, privateRows, privateValues, &h, k)
	})
	return pkcs11.ObjectHandle(h), priv, err
}

// Unwrap makes an object of a wrapped key.
func (s *Session) Unwrap(
	mechanism uint, unwrapping pkcs11.ObjectHandle, wrapped []byte, a Attributes,
) (pkcs11.ObjectHandle, error) {
	return s.object(a, func(shape *C.ck, rows C.ck, values *C.uchar, h *C.ck) C.ck {
		return C.unwrap(s.functions, C.ck(s.ID), C.ck(mechanism), C.ck(unwrapping),
			(*C.uchar)(unsafe.SliceData(wrapped)), C.ck(len(wrapped)), shape, rows, values, h)
	})
}

// Size is the length of an attribute that the token would give; 0 if it would not. The value is not fetched: the call
// has no buffer for it.
func (s *Session) Size(h pkcs11.ObjectHandle, attribute uint) (uint, error) {
	var size C.ck
	err := toError(C.attribute_size(s.functions, C.ck(s.ID), C.ck(h), C.ck(attribute), &size))
	if IsCKR(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) || err == nil &&
		uint(size) == pkcs11.CK_UNAVAILABLE_INFORMATION {
		return 0, nil
	}
	return uint(size), err
}
