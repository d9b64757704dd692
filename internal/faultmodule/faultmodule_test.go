package faultmodule_test

import (
	"crypto/rsa"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/directory/filestore"
	"github.com/kmehsm/kmehsm/factory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/internal/testkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// faulty is around the module of an operator's token; every token of these tests is reached by way of it, since the one
// C_Initialize of the process is its.
var faulty *faultmodule.Module

func TestMain(m *testing.M) {
	softhsmtest.MainWith(m, 32, func() error {
		dir, err := os.MkdirTemp(softhsmtest.Dir(), "fault-")
		if err != nil {
			return err
		}
		if faulty, err = faultmodule.Build(dir, softhsmtest.OperatorModule()); err != nil {
			return err
		}
		return faulty.Setenv()
	})
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func openFactory(t *testing.T, uri string, o hsmkeys.Options) *hsmkeys.FactoryToken {
	t.Helper()
	token := must[*hsmkeys.FactoryToken](t)(hsmkeys.OpenFactory(t.Context(), faulty.URI(uri), o))
	t.Cleanup(func() { token.Close() })
	return token
}

func openOperator(t *testing.T, uri string, o hsmkeys.Options) *hsmkeys.OperatorToken {
	t.Helper()
	token := must[*hsmkeys.OperatorToken](t)(hsmkeys.OpenOperator(t.Context(), faulty.URI(uri), o))
	t.Cleanup(func() {
		// As long as a call is in the module, that stays in use. On a busy machine, one may be given up that is slow.
		for end := time.Now().Add(testproc.Patience); token.Health().Hung > 0 && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		token.Close()
	})
	return token
}

// The standard mechanism for RFC 5649 is CKM_AES_KEY_WRAP_KWP since PKCS #11 3.0. A token that has only that makes lots
// as well; the manifest says so.
func TestKWPByEitherName(t *testing.T) {
	for _, c := range []struct{ tell, want string }{{"", "CKM_AES_KEY_WRAP_PAD"}, {"kwp", "CKM_AES_KEY_WRAP_KWP"}} {
		t.Run(c.want, func(t *testing.T) {
			faulty.Tell(t, c.tell)
			defer faulty.Tell(t)
			tok := softhsmtest.Token(t)
			token := must[*hsmkeys.FactoryToken](t)(hsmkeys.OpenFactory(t.Context(), faulty.URI(tok.URI),
				hsmkeys.Options{}))
			must[string](t)(first(factory.Init(t.Context(), token)))
			token.Close()
			fixture := must[*rsa.PrivateKey](t)(testkeys.RSA(3072))
			_, err := factory.EnrollFixture(t.Context(), faulty.URI(tok.URI), hsmkeys.PIN(tok.SOPIN), "f1",
				&fixture.PublicKey, 0)
			if err != nil {
				t.Fatal(err)
			}
			token = openFactory(t, tok.URI, hsmkeys.Options{})
			store, err := filestore.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			line := must[*factory.Line](t)(factory.NewLine(token, store, factory.State{Dir: t.TempDir()}))
			tac := must[kme.TAC](t)(kme.ParseTAC("35209900"))
			m := must[*directory.Manifest](t)(line.CreateLot(t.Context(),
				factory.LotSpec{Lot: "L1", Range: directory.Range{TAC: tac, Count: 4}, Bits: 2048,
					Suite: kme.SuiteECDSA, ShardSize: 4, Primes: hsmkeys.PrimesAuto}))
			if m.Wrapping != c.want {
				t.Errorf("the manifest says %q", m.Wrapping)
			}
			before := faulty.Counts()["C_WrapKey"]
			must[factory.Progress](t)(line.Provision(t.Context(), "L1",
				factory.ProvisionOptions{Out: t.TempDir(), Workers: 1}))
			if n := faulty.Counts()["C_WrapKey"] - before; n < 4 {
				t.Errorf("C_WrapKey was called %d times for 4 devices", n)
			}
			keys := must[[]hsmkeys.Key](t)(factory.Keys(t.Context(), token))
			for _, f := range must[[]hsmkeys.Finding](t)(token.DoctorFactory(t.Context(), keys...)) {
				if f.Required && !f.OK {
					t.Errorf("the doctor misses %+v", f)
				}
				if f.Check == "CKM_AES_KEY_WRAP_KWP" && f.OK != (c.tell == "kwp") {
					t.Error(fmt.Sprint(f))
				}
			}
		})
	}
}

func first(pem []byte, _ string, _ bool, err error) (string, error) { return string(pem), err }
