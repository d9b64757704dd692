package milenage

import (
	"encoding/hex"
	"fmt"
	"testing"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// 3GPP TS 35.208 clause 4.3, test set 1.
func TestSet1(t *testing.T) {
	s, err := New(unhex(t, "465b5ce8b199b49faa5f0a2ee238a6bc"), unhex(t, "cd63cb71954a9f4e48a5994e37a02baf"))
	if err != nil {
		t.Fatal(err)
	}
	rand := [16]byte(unhex(t, "23553cbe9637a89d218ae64dae47bf35"))
	macA, macS := s.f1(rand, unhex(t, "ff9bb4d0b607"), unhex(t, "b9b9"))
	res, ck, ik, ak := s.f2345(rand)
	got := fmt.Sprintf("%x %x %x %x %x %x %x", macA, macS, res, ck, ik, ak, s.f5star(rand))
	const want = "4a9ffac354dfafb3 01cfaf9ec4e871e9 a54211d5e3ba50bf b40ba9a3c58b2a05bbf0d987b21bf8cb " +
		"f769bcd751044604127672711c6d3441 aa689c648370 451e8beca43b"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	autn := append(append(unhex(t, "55f328b43577"), unhex(t, "b9b9")...), macA[:]...)
	if _, sqn, err := s.Authenticate(rand, autn); err != nil || sqn != 0xff9bb4d0b607 {
		t.Errorf("SQN %x, %v", sqn, err)
	}
	for i := range autn {
		autn[i] ^= 1
		if _, _, err := s.Authenticate(rand, autn); err == nil {
			t.Errorf("AUTN with another byte %d was accepted", i)
		}
		autn[i] ^= 1
	}
	if _, _, err := s.Authenticate(rand, autn[1:]); err == nil {
		t.Error("a short AUTN was accepted")
	}
	if _, err := New(nil, nil); err == nil {
		t.Error("no keys were accepted")
	}
}

// Kc and SRES are those of TS 35.208's test set 1 (c3 and c2 of its CK, IK and RES); SIM and network understand each
// other.
func TestBothSides(t *testing.T) {
	s, err := New(unhex(t, "465b5ce8b199b49faa5f0a2ee238a6bc"), unhex(t, "cd63cb71954a9f4e48a5994e37a02baf"))
	if err != nil {
		t.Fatal(err)
	}
	rand := [16]byte(unhex(t, "23553cbe9637a89d218ae64dae47bf35"))
	if sres, kc := s.GSM(rand); fmt.Sprintf("%x %x", sres, kc) != "46f8416a eae4be823af9a08b" {
		t.Errorf("SRES and Kc are %x %x", sres, kc)
	}
	autn, xres, _, _ := s.Challenge(rand, 1<<40|7, [2]byte{0x80})
	if res, sqn, err := s.Authenticate(rand, autn[:]); err != nil || sqn != 1<<40|7 || res != xres {
		t.Errorf("%x, SQN %x, %v", res, sqn, err)
	}
	auts := s.Resynchronise(rand, 1<<41)
	if sqn, err := s.Resynchronised(rand, auts[:]); err != nil || sqn != 1<<41 {
		t.Errorf("SQN %x, %v", sqn, err)
	}
	auts[13] ^= 1
	if _, err := s.Resynchronised(rand, auts[:]); err == nil {
		t.Error("AUTS with another byte was accepted")
	}
}
