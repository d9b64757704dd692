package proof

import (
	"bytes"
	"crypto/aes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/http"
	"testing"

	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/client/udm"
	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// The test sets of 3GPP TS 35.208 clause 4.3 (2 is the same as 1), as K, OPc, RAND, SQN, AMF, RES, CK and IK.
var sets = [][8]string{
	{"465b5ce8b199b49faa5f0a2ee238a6bc", "cd63cb71954a9f4e48a5994e37a02baf", "23553cbe9637a89d218ae64dae47bf35",
		"ff9bb4d0b607", "b9b9", "a54211d5e3ba50bf", "b40ba9a3c58b2a05bbf0d987b21bf8cb",
		"f769bcd751044604127672711c6d3441"},
	{"fec86ba6eb707ed08905757b1bb44b8f", "1006020f0a478bf6b699f15c062e42b3", "9f7c8d021accf4db213ccff0c7f71a6a",
		"9d0277595ffc", "725c", "8011c48c0c214ed2", "5dbdbb2954e8f3cde665b046179a5098",
		"59a92d3b476a0443487055cf88b2307b"},
	{"9e5944aea94b81165c82fbf9f32db751", "a64a507ae1a2a98bb88eb4210135dc87", "ce83dbc54ac0274a157c17f80d017bd6",
		"0b604a81eca8", "9e09", "f365cd683cd92e96", "e203edb3971574f5a94b0d61b816345d",
		"0c4524adeac041c4dd830d20854fc46b"},
	{"4ab1deb05ca6ceb051fc98e77d026a84", "dcf07cbd51855290b92a07a9891e523e", "74b0cd6031a1c8339b2b6ce2b8c4a186",
		"e880a1b580b6", "9f07", "5860fc1bce351e7e", "7657766b373d1c2138f307e3de9242f9",
		"1c42e960d89b8fa99f2744e0708ccb53"},
	{"6c38a116ac280c454f59332ee35c8c4f", "3803ef5363b947c6aaa225e58fae3934", "ee6466bc96202c5a557abbeff8babf63",
		"414b98222181", "4464", "16c8233f05a0ac28", "3f8c7587fe8e4b233af676aede30ba3b",
		"a7466cc1e6b2a1337d49d3b66e95d7b4"},
}

// A UDM does 5G-AKA with keysvc, and the vectors of TS 35.208. The test is device, AMF and AUSF, whose formulas of TS
// 33.501 Annex A are its own: neither AMF nor AUSF does or has anything that it has not without binding.
func TestUDM(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.setUp(lotOf{"L1", "tr33868-ecdsa-p256", "35209900", 2048, len(sets)})
	w.serve(func(*http.Client) {
		keysvc, err := client.New(client.Options{URLs: []string{"unix:" + w.path("s")}, Timeout: testproc.Patience})
		if err != nil {
			t.Fatal(err)
		}
		defer keysvc.Close()
		for i, d := range w.devices() {
			new5G(t, udm.New(keysvc), i, d).run(w)
		}
	})
}

// A ue5G is a subscriber with a device, at a UDM.
type ue5G struct {
	t       *testing.T
	udm     udm.UDM
	sim     *milenage.SIM
	set     [8]string
	supi    string
	device  device
	nextSQN uint64
	amf     [2]byte
}

const servingNetwork = "5G:mnc001.mcc001.3gppnetwork.org"

func new5G(t *testing.T, u udm.UDM, i int, d device) *ue5G {
	set := sets[i]
	sim, err := milenage.New(unhex(set[0]), unhex(set[1]))
	if err != nil {
		t.Fatal(err)
	}
	return &ue5G{t: t, udm: u, sim: sim, set: set, supi: fmt.Sprintf("imsi-00101%010d", i), device: d,
		nextSQN: binary.BigEndian.Uint64(append([]byte{0, 0}, unhex(set[3])...)), amf: [2]byte(unhex(set[4]))}
}

// vector is what the UDM's ARPF makes.
func (u *ue5G) vector(rand [16]byte) udm.Vector {
	autn, xres, ck, ik := u.sim.Challenge(rand, u.nextSQN, u.amf)
	u.nextSQN++
	return udm.Vector{RAND: rand, AUTN: autn, XRES: xres[:], CK: ck, IK: ik}
}

func (u *ue5G) generate(v udm.Vector) udm.AV {
	u.t.Helper()
	av, err := u.udm.GenerateAuthData(u.t.Context(), u.supi, servingNetwork, v)
	if err != nil {
		u.t.Fatal(err)
	}
	return av
}

// kdf is TS 33.220 Annex B.2.
func kdf(key []byte, fc byte, parameters ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte{fc})
	for _, p := range parameters {
		h.Write(append(bytes.Clone(p), byte(len(p)>>8), byte(len(p))))
	}
	return h.Sum(nil)
}

// aka is 5G-AKA (TS 33.501 clause 6.1.3.2): whether AMF and AUSF accept the device, which holds a KME or none.
func (u *ue5G) aka(av udm.AV, key []byte) bool {
	u.t.Helper()
	hxres := sha256.Sum256(append(av.RAND[:], av.XRESStar[:]...)) // the AUSF's, with the RAND that it has

	rand := av.RAND // the device's
	if key != nil {
		block, err := aes.NewCipher(key)
		if err != nil {
			u.t.Fatal(err)
		}
		block.Decrypt(rand[:], rand[:])
	}
	res, sqn, err := u.sim.Authenticate(rand, av.AUTN[:])
	if err != nil {
		return false // a MAC failure
	}
	_, _, ck, ik := u.sim.Challenge(rand, sqn, [2]byte(av.AUTN[6:]))
	keys := append(ck[:], ik[:]...)
	resStar := kdf(keys, 0x6b, []byte(servingNetwork), rand[:], res[:])[16:]

	hres := sha256.Sum256(append(av.RAND[:], resStar...)) // the AMF's, with the RAND that it sent
	if !bytes.Equal(hres[16:], hxres[16:]) || !bytes.Equal(resStar, av.XRESStar[:]) {
		return false
	}
	if ours := udm.HXRESStar(av.RAND, av.XRESStar); !bytes.Equal(ours[:], hxres[16:]) {
		u.t.Error("HXRES* differs")
	}
	if kausf := kdf(keys, 0x6a, []byte(servingNetwork), av.AUTN[:6]); !bytes.Equal(kausf, av.KAUSF[:]) {
		u.t.Error("device and UDM have another KAUSF")
	}
	return true
}

func (u *ue5G) confirm(success bool) (served bool) {
	u.t.Helper()
	served, err := u.udm.ConfirmAuth(u.t.Context(), u.supi, servingNetwork, success)
	if err != nil {
		u.t.Fatal(err)
	}
	return served
}

func (u *ue5G) run(w *world) {
	t := u.t
	clear := u.vector([16]byte{1, byte(u.nextSQN)})
	av := u.generate(clear)
	if av.AttemptID == "" || av.RAND != clear.RAND || !u.aka(av, nil) {
		t.Fatalf("%s: the first vector is %+v", u.supi, av)
	}
	plain := w.plaintext(u.device)
	nwSig, err := u.udm.Provision(t.Context(), u.supi, servingNetwork, "imei-"+u.device.imei+"0", av.AttemptID,
		w.encrypt(u.device, plain))
	if want := plain.NWSig(); err != nil || nwSig != want {
		t.Fatalf("%s: NW_SIG %x, %v", u.supi, nwSig, err)
	}

	// TS 35.208's vector, under the KME.
	set := u.vector([16]byte(unhex(u.set[2])))
	_, sqn, err := u.sim.Authenticate(set.RAND, set.AUTN[:])
	if got := [3]string{hex.EncodeToString(set.XRES), hex.EncodeToString(set.CK[:]),
		hex.EncodeToString(set.IK[:])}; got != [3]string(u.set[5:]) || err != nil {
		t.Fatalf("%s, SQN %x: RES, CK and IK are %v, %v", u.supi, sqn, got, err)
	}
	av = u.generate(set)
	if av.AttemptID != "" || av.RAND == set.RAND {
		t.Fatalf("%s: the vector of a bound subscription is %+v", u.supi, av)
	}
	other := kme.RandomSecret()
	for what, key := range map[string][]byte{"no KME": nil, "another KME": other.Bytes()} {
		if u.aka(av, key) {
			t.Errorf("%s: a device with %s is let in", u.supi, what)
		}
	}
	if !u.aka(av, plain.KME.Bytes()) {
		t.Errorf("%s: the bound device is refused", u.supi)
	}
	if restored, err := u.udm.RestoreRAND(t.Context(), u.supi, servingNetwork, av.RAND); err != nil ||
		restored != set.RAND {
		t.Errorf("%s: RestoreRAND gives %x, %v", u.supi, restored, err)
	}
	if !u.confirm(true) {
		t.Errorf("%s: the bound device may not be served", u.supi)
	}
	if !u.confirm(false) { // an ACTIVE binding stands
		t.Errorf("%s: another device's failure has ended the binding", u.supi)
	}
}
