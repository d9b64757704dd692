package hsmkeys

/*
typedef unsigned long ck;
typedef struct { ck mechanism; void *parameter; ck length; } ck_mechanism;
typedef struct { ck type; void *value; ck length; } ck_attribute;

// CK_FUNCTION_LIST of PKCS #11 2.40, with which those of later versions begin.
typedef struct { unsigned char version[2]; ck (*function[68])(); } ck_list;
enum { create_object = 20, encrypt_init = 29, decrypt_init = 33, sign_init = 42, wrap_key = 60, unwrap_key = 61 };
enum { max_attributes = 32 };

static ck crypt(ck_list *list, int init, ck session, ck mechanism, ck key, unsigned char *in, ck in_size, unsigned char *out, ck *out_size)
{
	ck_mechanism m = { mechanism, 0, 0 };
	ck rv = ((ck (*)(ck, ck_mechanism *, ck))list->function[init])(session, &m, key);
	if (rv)
		return rv;
	return ((ck (*)(ck, unsigned char *, ck, unsigned char *, ck *))list->function[init + 1])(session, in, in_size, out, out_size);
}

static ck wrap(ck_list *list, ck session, ck mechanism, ck wrapping, ck key, unsigned char *out, ck *out_size)
{
	ck_mechanism m = { mechanism, 0, 0 };
	return ((ck (*)(ck, ck_mechanism *, ck, ck, unsigned char *, ck *))list->function[wrap_key])(session, &m, wrapping, key, out, out_size);
}

// template makes attributes of shape, a type and a size of each, and their values in a row.
static void template(ck_attribute *a, const ck *shape, ck count, unsigned char *values)
{
	for (ck i = 0; i < count; i++, values += shape[1], shape += 2)
		a[i] = (ck_attribute){ shape[0], values, shape[1] };
}

static ck create(ck_list *list, ck session, const ck *shape, ck count, unsigned char *values, ck *object)
{
	ck_attribute a[max_attributes];
	template(a, shape, count, values);
	return ((ck (*)(ck, ck_attribute *, ck, ck *))list->function[create_object])(session, a, count, object);
}

static ck unwrap(ck_list *list, ck session, ck mechanism, ck unwrapping, unsigned char *in, ck in_size, const ck *shape, ck count, unsigned char *values, ck *object)
{
	ck_mechanism m = { mechanism, 0, 0 };
	ck_attribute a[max_attributes];
	template(a, shape, count, values);
	return ((ck (*)(ck, ck_mechanism *, ck, unsigned char *, ck, ck_attribute *, ck, ck *))list->function[unwrap_key])(session, &m, unwrapping, in, in_size, a, count, object);
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

// Here are the calls that miekg/pkcs11 is not made for: those on the way of every payload and every device key. It asks the token for the
// size of each result with a call of its own, which is a round trip to a network HSM, and for C_WrapKey half of the work in SoftHSM; and it
// frees the copies that it makes of secrets without wiping them. See docs/decisions/0012-direct-calls.md.

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

// shape is a template as C takes it: pairs of type and size, and the values in a row.
func shape(a attributes) (shape []C.ck, values []byte, err error) {
	if len(a) > C.max_attributes {
		return nil, nil, fmt.Errorf("a template of %d attributes: there is room for %d, see max_attributes",
			len(a), C.max_attributes)
	}
	size := 0
	for _, e := range a {
		size += len(e.Value)
	}
	shape, values = make([]C.ck, 0, 2*C.max_attributes), make([]byte, 0, size)
	for _, e := range a {
		shape = append(shape, C.ck(e.Type), C.ck(len(e.Value)))
		values = append(values, e.Value...)
	}
	return shape, values, nil
}

// create makes an object. The copies of its values are wiped.
func (s *session) create(a attributes) (pkcs11.ObjectHandle, error) {
	shape, values, err := shape(a)
	if err != nil {
		return 0, err
	}
	defer clear(values)
	var h C.ck
	rv := C.create(s.list, C.ck(s.h), unsafe.SliceData(shape), C.ck(len(shape)/2), (*C.uchar)(unsafe.SliceData(values)), &h)
	return pkcs11.ObjectHandle(h), toError(rv)
}

// unwrap makes an object of a wrapped key.
func (s *session) unwrap(mechanism uint, unwrapping pkcs11.ObjectHandle, wrapped []byte, a attributes) (pkcs11.ObjectHandle, error) {
	shape, values, err := shape(a)
	if err != nil {
		return 0, err
	}
	var h C.ck
	rv := C.unwrap(s.list, C.ck(s.h), C.ck(mechanism), C.ck(unwrapping), (*C.uchar)(unsafe.SliceData(wrapped)), C.ck(len(wrapped)),
		unsafe.SliceData(shape), C.ck(len(shape)/2), (*C.uchar)(unsafe.SliceData(values)), &h)
	return pkcs11.ObjectHandle(h), toError(rv)
}
