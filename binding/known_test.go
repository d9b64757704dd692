package binding_test

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/kme"
)

// known are the known answers of kme/testdata.
type known struct {
	Lots []struct {
		Name string
		Key  string `json:"private_key_pkcs8_pem"`
	}
	Vectors []*vector
}

type vector struct {
	Name    string
	Suite   kme.Suite
	Expect  string
	Why     string
	Lot     string   `json:"lot_key"`
	Device  []byte   `json:"device_public_key_spki_b64"`
	KME     hexBytes `json:"kme_hex"`
	RME     hexBytes `json:"rme_hex"`
	Payload hexBytes `json:"payload_hex"`
	NWSig   hexBytes `json:"nw_sig_hex"`
}

// secondOfPair says that the vector is the one to be refused for its KME, which the first of the pair has used.
func (v *vector) secondOfPair() bool { return strings.Contains(v.Name, "second of a malleated pair") }

type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

var vectors = func() func(t testing.TB) *known {
	read := sync.OnceValues(func() (*known, error) {
		data, err := os.ReadFile(filepath.FromSlash("../kme/testdata/kme-payload.json"))
		if err != nil {
			return nil, err
		}
		k := new(known)
		return k, json.Unmarshal(data, k)
	})
	return func(t testing.TB) *known {
		t.Helper()
		return must[*known](t)(read())
	}
}()

func (k *known) lot(t testing.TB, name string) *rsa.PrivateKey {
	t.Helper()
	for _, l := range k.Lots {
		if l.Name == name {
			block, _ := pem.Decode([]byte(l.Key))
			return must[any](t)(x509.ParsePKCS8PrivateKey(block.Bytes)).(*rsa.PrivateKey)
		}
	}
	t.Fatalf("the known answers have no lot %s", name)
	return nil
}

// newKnown is an operator who serves the lots of the known answers, and the device of each. A manifest has one suite,
// so a lot key that is used with two stands for two lots.
func newKnown(t testing.TB) (r *harness, devices map[*vector]*device) {
	t.Helper()
	r, m, k := newHarness(t), newMaker(t), vectors(t)
	r.enroll(t, m)
	type lotOf struct {
		key   string
		suite kme.Suite
	}
	keys := map[lotOf][]any{}
	index := map[string]int{} // of a device in its lot, by its key
	for _, v := range k.Vectors {
		at := lotOf{v.Lot, v.Suite}
		if _, seen := index[string(v.Device)]; !seen {
			index[string(v.Device)] = len(keys[at])
			keys[at] = append(keys[at], must[any](t)(x509.ParsePKIXPublicKey(v.Device)))
		}
	}
	lots := map[lotOf]*lot{}
	for at, devices := range keys {
		name := at.key + "-" + string(at.suite)
		lots[at] = m.newLot(t, name, at.suite, k.lot(t, at.key), 100*(len(lots)+1), devices...)
		r.take(t, m, lots[at])
	}
	devices = map[*vector]*device{}
	for _, v := range k.Vectors {
		devices[v] = lots[lotOf{v.Lot, v.Suite}].devices[index[string(v.Device)]]
	}
	r.recorder.take()
	return r, devices
}
