package keyop

import (
	"context"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
)

// Find looks a key up by CKA_ID, and fails with ErrNoKey. Two keys of one ID are an error: neither can be trusted.
func Find(t *p11.Token, s *p11.Session, class uint, k keyspec.Key) (pkcs11.ObjectHandle, error) {
	return t.Remembered(p11.Object{Class: class, ID: string(k.ID())}, func() (pkcs11.ObjectHandle, error) {
		found, err := findAll(s, class, k)
		switch {
		case err != nil:
			return 0, err
		case len(found) == 0:
			return 0, fmt.Errorf("%s: %w", k.Label(), p11.ErrNoKey)
		case len(found) > 1:
			return 0, fmt.Errorf("%s has %d objects %q: only one of them can be ours; remove the others with the "+
				"token's own tool", t, len(found), k.Label())
		}
		return found[0], checkMaker(t, s, class, found[0], k)
	})
}

// checkMaker refuses an object that looks like a key of ours and that others could have made. CKA_ID and label prove
// nothing: objects that are not PRIVATE can be made and destroyed without a PIN. Only the security officer can make
// TRUSTED keys. An injection key must be TRUSTED: it wraps device keys, and with the user PIN somebody could replace it
// by one whose value they know.
func checkMaker(t *p11.Token, s *p11.Session, class uint, h pkcs11.ObjectHandle, k keyspec.Key) error {
	if class == pkcs11.CKO_PUBLIC_KEY {
		return nil // it is compared with its private half, or the token itself insists on TRUSTED
	}
	is := func(typ uint) (bool, error) {
		a, err := s.Get(h, typ)
		return err == nil && ck.IsTrue(a[0]), p11.Explain("look at "+k.Label(), err)
	}
	ok, err := false, error(nil)
	if k.Role != keyspec.RoleInjection {
		ok, err = is(pkcs11.CKA_PRIVATE)
	}
	if err == nil && !ok && class == pkcs11.CKO_SECRET_KEY {
		ok, err = is(pkcs11.CKA_TRUSTED)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s has an object %q that the wrong user has made: others may know its value. "+
			"Find out who made it, remove it with the token's own tool, and make the key anew", t, k.Label())
	}
	return err
}

func findAll(s *p11.Session, class uint, k keyspec.Key) ([]pkcs11.ObjectHandle, error) {
	found, err := s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, class), ck.Attr(pkcs11.CKA_TOKEN, true),
		ck.Attr(pkcs11.CKA_ID, k.ID())})
	return found, p11.Explain("look for "+k.Label(), err)
}

// Destroy destroys a key, and every other one with its CKA_ID.
func Destroy(t *p11.Token, s *p11.Session, class uint, k keyspec.Key) error {
	found, err := findAll(s, class, k)
	if err != nil {
		return err
	}
	defer t.Forget() // afterwards: until then it can be found
	for _, h := range found {
		if err := s.Destroy(h); err != nil {
			return p11.Explain("remove "+k.Label(), err)
		}
	}
	return nil
}

// RememberPrivateKeys finds all private keys at once: some tokens, as SoftHSM, read all their objects for each search.
// Keys that Find would refuse are left out. It gives the session back between short parts of the work.
func RememberPrivateKeys(ctx context.Context, t *p11.Token) (n int, err error) {
	const together, operation = 100, "look for a key"
	epoch := t.Epoch()
	all, err := p11.Do(ctx, t, operation, func(s *p11.Session) ([]pkcs11.ObjectHandle, error) {
		return s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
			ck.Attr(pkcs11.CKA_TOKEN, true)})
	})
	if err != nil {
		return 0, err
	}
	type named struct {
		handle  pkcs11.ObjectHandle
		objects int
		private bool
	}
	byID := map[string]named{}
	for some := range slices.Chunk(all, together) {
		attributes, err := p11.Do(ctx, t, operation, func(s *p11.Session) (all [][][]byte, err error) {
			for _, h := range some {
				a, err := s.Get(h, pkcs11.CKA_ID, pkcs11.CKA_PRIVATE)
				if err != nil {
					return nil, err
				}
				all = append(all, a)
			}
			return all, nil
		})
		if err != nil {
			return 0, err
		}
		for i, a := range attributes {
			id := string(a[0])
			byID[id] = named{handle: some[i], objects: byID[id].objects + 1, private: ck.IsTrue(a[1])}
		}
	}
	for id, k := range byID {
		if k.objects == 1 && k.private {
			t.Remember(epoch, p11.Object{Class: pkcs11.CKO_PRIVATE_KEY, ID: id}, k.handle)
			n++
		}
	}
	return n, nil
}
