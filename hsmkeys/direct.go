package hsmkeys

/*
typedef unsigned long ck;
typedef struct { ck mechanism; void *parameter; ck length; } ck_mechanism;
typedef struct { ck type; void *value; ck length; } ck_attribute;

// CK_FUNCTION_LIST of PKCS #11 2.40, with which those of later versions begin.
typedef struct { unsigned char version[2]; ck (*function[68])(); } ck_list;
enum { create_object = 20, get_attribute_value = 24, encrypt_init = 29, decrypt_init = 33, sign_init = 42, generate_key = 58, generate_key_pair = 59, wrap_key = 60, unwrap_key = 61 };
enum { max_attributes = 32 };

// RSA-OAEP with SHA-1 and MGF1-SHA-1, CK_RSA_PKCS_OAEP_PARAMS: see oaep in keys.go.
enum { ckm_rsa_pkcs_oaep = 9 };
static struct { ck hash, mgf, source; void *label; ck size; } oaep = { 0x220, 1, 1, 0, 0 };

static ck_mechanism mechanism(ck m)
{
	if (m == ckm_rsa_pkcs_oaep)
		return (ck_mechanism){ m, &oaep, sizeof oaep };
	return (ck_mechanism){ m, 0, 0 };
}

// A template, and the members of its array attributes. Go gives it as rows: a type, a size and a number of members for each attribute; and their
// values one after the other. The members of an array attribute follow it.
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

static ck crypt(ck_list *list, int init, ck session, ck m, ck key, unsigned char *in, ck in_size, unsigned char *out, ck *out_size)
{
	ck_mechanism how = mechanism(m);
	ck rv = ((ck (*)(ck, ck_mechanism *, ck))list->function[init])(session, &how, key);
	if (rv)
		return rv;
	return ((ck (*)(ck, unsigned char *, ck, unsigned char *, ck *))list->function[init + 1])(session, in, in_size, out, out_size);
}

static ck wrap(ck_list *list, ck session, ck m, ck wrapping, ck key, unsigned char *out, ck *out_size)
{
	ck_mechanism how = mechanism(m);
	return ((ck (*)(ck, ck_mechanism *, ck, ck, unsigned char *, ck *))list->function[wrap_key])(session, &how, wrapping, key, out, out_size);
}

static ck create(ck_list *list, ck session, const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_template t;
	template(&t, shape, rows, values);
	return ((ck (*)(ck, ck_attribute *, ck, ck *))list->function[create_object])(session, t.a, t.count, object);
}

static ck generate(ck_list *list, ck session, ck m, const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_mechanism how = mechanism(m);
	ck_template t;
	template(&t, shape, rows, values);
	return ((ck (*)(ck, ck_mechanism *, ck_attribute *, ck, ck *))list->function[generate_key])(session, &how, t.a, t.count, object);
}

static ck generate_pair(ck_list *list, ck session, ck m, const ck *shape, ck rows, unsigned char *values,
	const ck *private_shape, ck private_rows, unsigned char *private_values, ck *public, ck *private)
{
	ck_mechanism how = mechanism(m);
	ck_template t, p;
	template(&t, shape, rows, values);
	template(&p, private_shape, private_rows, private_values);
	return ((ck (*)(ck, ck_mechanism *, ck_attribute *, ck, ck_attribute *, ck, ck *, ck *))list->function[generate_key_pair])(session, &how, t.a, t.count, p.a, p.count, public, private);
}

static ck unwrap(ck_list *list, ck session, ck m, ck unwrapping, unsigned char *in, ck in_size, const ck *shape, ck rows, unsigned char *values, ck *object)
{
	ck_mechanism how = mechanism(m);
	ck_template t;
	template(&t, shape, rows, values);
	return ((ck (*)(ck, ck_mechanism *, ck, unsigned char *, ck, ck_attribute *, ck, ck *))list->function[unwrap_key])(session, &how, unwrapping, in, in_size, t.a, t.count, object);
}

static ck attribute_size(ck_list *list, ck session, ck object, ck type, ck *size)
{
	ck_attribute a = { type, 0, 0 };
	ck rv = ((ck (*)(ck, ck, ck_attribute *, ck))list->function[get_attribute_value])(session, object, &a, 1);
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

// Here are the calls that miekg/pkcs11 is not made for: those that make objects, since it cannot express a template within a template; and those on
// the way of every payload and every device key. It asks the token for the size of each result with a call of its own, which is a round trip to a
// network HSM, and for C_WrapKey half of the work in SoftHSM; and it frees the copies that it makes of secrets without wiping them. See
// docs/decisions/0012-direct-calls.md.

type functionList = *C.ck_list

// functions is the function list that miekg/pkcs11 has got from the module: p11-kit's client would give another one that knows nothing of
// the sessions of this one.
func functions(module *pkcs11.Ctx) (functionList, error) {
	if ctx := reflect.ValueOf(module).Elem().FieldByName("ctx"); ctx.Kind() == reflect.Pointer {
		if sym := ctx.Elem().FieldByName("sym"); sym.Kind() == reflect.Pointer && !sym.IsNil() {
			return (functionList)(sym.UnsafePointer()), nil
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

// crypt makes the two calls of an operation in one part: init, and what follows that in the list. out has room for the result.
func (s *session) crypt(init C.int, mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	size := C.ck(len(out))
	rv := C.crypt(s.list, init, C.ck(s.h), C.ck(mechanism), C.ck(key), (*C.uchar)(unsafe.SliceData(in)), C.ck(len(in)), (*C.uchar)(unsafe.SliceData(out)), &size)
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

func (s *session) encrypt(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.encrypt_init, mechanism, key, in, out)
}

func (s *session) decrypt(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.decrypt_init, mechanism, key, in, out)
}

func (s *session) sign(mechanism uint, key pkcs11.ObjectHandle, in, out []byte) ([]byte, error) {
	return s.crypt(C.sign_init, mechanism, key, in, out)
}

// wrap wraps a key. out has room for the result.
func (s *session) wrap(mechanism uint, wrapping, key pkcs11.ObjectHandle, out []byte) ([]byte, error) {
	size := C.ck(len(out))
	rv := C.wrap(s.list, C.ck(s.h), C.ck(mechanism), C.ck(wrapping), C.ck(key), (*C.uchar)(unsafe.SliceData(out)), &size)
	if err := toError(rv); err != nil {
		return nil, err
	}
	return written(out, uint(size))
}

// nested is an array attribute, as CKA_UNWRAP_TEMPLATE is, with its members: a part of a template. A template within it is not possible.
func nested(typ uint, members ...attributes) attributes {
	all := join(members...)
	return append(attributes{{Type: typ, Value: []byte{byte(len(all))}}}, all...)
}

// ckfArrayAttribute is in the types of array attributes (PKCS #11 v2.40 section 4.1).
const ckfArrayAttribute = 0x40000000

// shape is a template as C takes it: a type, a size and a number of members for each attribute, and their values in a row, copies that may be secret.
func shape(a attributes) (rows []C.ck, values []byte, err error) {
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
		if e.Type&ckfArrayAttribute != 0 {
			rows = append(rows, C.ck(e.Type), 0, C.ck(e.Value[0]))
			continue
		}
		rows = append(rows, C.ck(e.Type), C.ck(len(e.Value)), 0)
		values = append(values, e.Value...)
	}
	return rows, values, nil
}

// create makes an object. The copies of its values are wiped.
func (s *session) create(a attributes) (pkcs11.ObjectHandle, error) {
	return s.fitting(a, func(a attributes) (pkcs11.ObjectHandle, error) {
		rows, values, err := shape(a)
		if err != nil {
			return 0, err
		}
		defer clear(values)
		var h C.ck
		rv := C.create(s.list, C.ck(s.h), unsafe.SliceData(rows), C.ck(len(rows)/3), (*C.uchar)(unsafe.SliceData(values)), &h)
		return pkcs11.ObjectHandle(h), toError(rv)
	})
}

// generate makes a secret key.
func (s *session) generate(mechanism uint, a attributes) (pkcs11.ObjectHandle, error) {
	return s.fitting(a, func(a attributes) (pkcs11.ObjectHandle, error) {
		rows, values, err := shape(a)
		if err != nil {
			return 0, err
		}
		var h C.ck
		rv := C.generate(s.list, C.ck(s.h), C.ck(mechanism), unsafe.SliceData(rows), C.ck(len(rows)/3), (*C.uchar)(unsafe.SliceData(values)), &h)
		return pkcs11.ObjectHandle(h), toError(rv)
	})
}

// generatePair makes a key pair.
func (s *session) generatePair(mechanism uint, public, private attributes) (pub, priv pkcs11.ObjectHandle, err error) {
	rows, values, err := shape(public)
	if err != nil {
		return 0, 0, err
	}
	priv, err = s.fitting(private, func(private attributes) (pkcs11.ObjectHandle, error) {
		privateRows, privateValues, err := shape(private)
		if err != nil {
			return 0, err
		}
		var h, k C.ck
		rv := C.generate_pair(s.list, C.ck(s.h), C.ck(mechanism), unsafe.SliceData(rows), C.ck(len(rows)/3), (*C.uchar)(unsafe.SliceData(values)),
			unsafe.SliceData(privateRows), C.ck(len(privateRows)/3), (*C.uchar)(unsafe.SliceData(privateValues)), &h, &k)
		pub = pkcs11.ObjectHandle(h)
		return pkcs11.ObjectHandle(k), toError(rv)
	})
	return pub, priv, err
}

// unwrap makes an object of a wrapped key.
func (s *session) unwrap(mechanism uint, unwrapping pkcs11.ObjectHandle, wrapped []byte, a attributes) (pkcs11.ObjectHandle, error) {
	return s.fitting(a, func(a attributes) (pkcs11.ObjectHandle, error) {
		rows, values, err := shape(a)
		if err != nil {
			return 0, err
		}
		var h C.ck
		rv := C.unwrap(s.list, C.ck(s.h), C.ck(mechanism), C.ck(unwrapping), (*C.uchar)(unsafe.SliceData(wrapped)), C.ck(len(wrapped)),
			unsafe.SliceData(rows), C.ck(len(rows)/3), (*C.uchar)(unsafe.SliceData(values)), &h)
		return pkcs11.ObjectHandle(h), toError(rv)
	})
}

// size is how long an attribute is that the token would give, 0 if it would not. The value is not fetched: there is no room for it in the call.
func (s *session) size(h pkcs11.ObjectHandle, attribute uint) (uint, error) {
	var size C.ck
	err := toError(C.attribute_size(s.list, C.ck(s.h), C.ck(h), C.ck(attribute), &size))
	if isCKR(err, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) || err == nil && uint(size) == pkcs11.CK_UNAVAILABLE_INFORMATION {
		return 0, nil
	}
	return uint(size), err
}
