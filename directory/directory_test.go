package directory

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/directory/internal/packed"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

func TestManifestValidate(t *testing.T) {
	s := newSigner(t)
	for name, c := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"good":               {func(*Manifest) {}, ""},
		"no name":            {func(m *Manifest) { m.Lot = "" }, "name"},
		"a path":             {func(m *Manifest) { m.Lot = "../x" }, "name"},
		"dots":               {func(m *Manifest) { m.Lot = "a..b" }, "name"},
		"a long name":        {func(m *Manifest) { m.Lot = strings.Repeat("x", 65) }, "name"},
		"no manufacturer":    {func(m *Manifest) { m.Manufacturer = "" }, "manufacturer"},
		"no suite":           {func(m *Manifest) { m.Suite = "" }, "suite"},
		"even e":             {func(m *Manifest) { m.E = 65536 }, "65537"},
		"no modulus":         {func(m *Manifest) { m.N = nil }, "modulus"},
		"even modulus":       {func(m *Manifest) { m.N[255] &^= 1 }, "odd"},
		"leading zero":       {func(m *Manifest) { m.N[0] = 0 }, "leading zero"},
		"odd length":         {func(m *Manifest) { m.N = m.N[1:]; m.N[0] |= 0x80 }, "2040 bits"},
		"suite and modulus":  {func(m *Manifest) { m.Suite = kme.SuiteRSA }, "2048 bits"},
		"no mechanism":       {func(m *Manifest) { m.Mechanism = "" }, "made"},
		"no time":            {func(m *Manifest) { m.Created = time.Time{} }, "made"},
		"shards of none":     {func(m *Manifest) { m.ShardSize = 0 }, "1024"},
		"shards too large":   {func(m *Manifest) { m.ShardSize = 1025 }, "1024"},
		"no ranges":          {func(m *Manifest) { m.Ranges = nil }, "no IMEIs"},
		"no TAC":             {func(m *Manifest) { m.Ranges[0].TAC = kme.TAC{} }, "serial numbers"},
		"no devices":         {func(m *Manifest) { m.Ranges[0].Count = 0 }, "one device at least"},
		"negative":           {func(m *Manifest) { m.Ranges[0].First = -1 }, "serial numbers"},
		"beyond the TAC":     {func(m *Manifest) { m.Ranges[0].Count = 8 }, "serial numbers"},
		"a count that wraps": {func(m *Manifest) { m.Ranges[0].Count = 1<<63 - 1 }, "serial numbers"},
		"overlapping":        {func(m *Manifest) { m.Ranges[1] = m.Ranges[0] }, "overlap"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManifest(t, s, "L1")
			c.change(m)
			err := m.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
}

func TestPositions(t *testing.T) {
	m := newManifest(t, newSigner(t), "L1")
	if m.Devices() != 10 || m.Shards() != 3 {
		t.Fatal(m.Devices(), m.Shards())
	}
	for i := range m.Devices() {
		if at, ok := m.Position(m.IMEI(i)); !ok || at != i {
			t.Errorf("device %d is %v, at %d", i, m.IMEI(i), at)
		}
	}
	for _, s := range []string{"35209900999992", "35209901000003", "35209902000000"} {
		imei, _ := kme.ParseIMEI(s)
		if _, ok := m.Position(imei); ok {
			t.Errorf("%s is in the lot", s)
		}
	}
	for n, want := range [][2]int{{0, 4}, {4, 4}, {8, 2}, {12, 0}} {
		if first, count := m.ShardRange(n); first != want[0] || count != want[1] {
			t.Errorf("shard %d has %d from %d", n, count, first)
		}
	}
	if m.IMEI(10) != (kme.IMEI{}) {
		t.Error("there is an eleventh device")
	}
	other := newManifest(t, newSigner(t), "L2")
	other.Ranges = []Range{{tac(t, "35209901"), 2, 5}}
	if r := m.Overlap(other); r == nil || r.First != 2 {
		t.Errorf("overlap %v", r)
	}
	other.Ranges[0].First = 3
	if r := m.Overlap(other); r != nil {
		t.Errorf("overlap %v", r)
	}
}

func TestPublishAgain(t *testing.T) {
	s := newSigner(t)
	store, m := newLot(t, s, "L1")
	// Another signature each time, and the same payload.
	if err := Publish(t.Context(), store, ManifestPath("L1"), s, TypeManifest, m); err != nil {
		t.Errorf("the same again: %v", err)
	}
	changed := *m
	changed.ShardSize = 5
	if err := Publish(t.Context(), store, ManifestPath("L1"), s, TypeManifest, &changed); !errors.As(err,
		new(*ConflictError)) {
		t.Errorf("another payload: %v", err)
	}
	if err := Publish(t.Context(), store, ManifestPath("L1"), newSigner(t), TypeManifest, m); !errors.As(err,
		new(*ConflictError)) {
		t.Errorf("another manufacturer's: %v", err)
	}
}

// What is published, byte for byte: the key is the base point of P-256 (SP 800-186, 3.2.1.3), the hash that of "abc"
// (FIPS 180-4).
func TestPublishedEncodings(t *testing.T) {
	const jwk = `{"kty":"EC","kid":"35209900000001","crv":"P-256","x":"axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY",` +
		`"y":"T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"}`
	const sum = `"ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"`
	imei, _ := kme.ParseIMEI("35209900000001")
	var key DeviceKey
	if err := key.UnmarshalJSON([]byte(jwk)); err != nil {
		t.Fatal(err)
	}
	hash, at := sha256.Sum256([]byte("abc")), time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		v    any
		want string
	}{
		{Shard{"L1", 7, hash[:], []DeviceKey{key}}, `{"lot":"L1","shard":7,"package":` + sum +
			`,"keys":[` + jwk + `]}`},
		{Revocation{imei, "RMA 1", at, &key, hash[:]},
			`{"imei":"35209900000001","reason":"RMA 1","time":"2026-01-02T03:04:05Z","key":` + jwk +
				`,"package":` + sum + `}`},
		{Revocation{imei, "stolen", at, nil, nil},
			`{"imei":"35209900000001","reason":"stolen","time":"2026-01-02T03:04:05Z"}`},
	} {
		if have, err := json.Marshal(c.v); err != nil || string(have) != c.want {
			t.Errorf("%s, %v\nwant\n%s", have, err, c.want)
		}
	}
}

func TestShardEqual(t *testing.T) {
	m := newManifest(t, newSigner(t), "L1")
	keys := keysOf(t, m, 0)
	shard := func(n int, key DeviceKey, hash []byte) *Shard {
		return &Shard{"L1", n, hash, []DeviceKey{keys[0], key}}
	}
	one := shard(0, keys[1], someHash)
	for name, c := range map[string]struct {
		other *Shard
		want  bool
	}{
		"the same":        {shard(0, keys[1], bytes.Clone(someHash)), true},
		"another number":  {shard(1, keys[1], someHash), false},
		"another key":     {shard(0, DeviceKey{keys[1].IMEI, newKey(t).Public()}, someHash), false},
		"another IMEI":    {shard(0, DeviceKey{keys[2].IMEI, keys[1].Key}, someHash), false},
		"another package": {shard(0, keys[1], someHash[1:]), false},
		"a key fewer":     {&Shard{"L1", 0, someHash, keys[:1]}, false},
	} {
		if one.Equal(c.other) != c.want || c.other.Equal(one) != c.want {
			t.Errorf("%s: not %v", name, c.want)
		}
	}
}

func FuzzPayloads(f *testing.F) {
	s := newSigner(f)
	m := newManifest(f, s, "L1")
	shard, err := NewShard(m, 0, keysOf(f, m, 0), someHash)
	if err != nil {
		f.Fatal(err)
	}
	reissued := Revocation{m.IMEI(0), "x", time.Now().UTC(), &shard.Keys[0], someHash}
	part := &RevocationPart{Lot: "L1", Version: 1, Revoked: []Revocation{reissued}}
	for _, v := range []any{m, shard, &Revocations{Lot: "L1", Version: 1}, part} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var anyM Manifest
		if strict.Parse(data, &anyM) == nil && anyM.Validate() == nil {
			for _, i := range []int{0, anyM.Devices() - 1} {
				if at, ok := anyM.Position(anyM.IMEI(i)); !ok || at != i {
					t.Errorf("device %d of %+v is at %d", i, anyM, at)
				}
			}
		}
		var anyS Shard
		if strict.Parse(data, &anyS) == nil && anyS.check(m, 0) == nil {
			if len(anyS.Package) != sha256.Size {
				t.Errorf("a shard with the hash %x was accepted", anyS.Package)
			}
			for _, k := range anyS.Keys {
				if key, err := packed.Join(1, func(int) crypto.PublicKey {
					return k.Key
				}).At(0, m.Suite); err != nil || !k.Key.(*ecdsa.PublicKey).Equal(key) {
					t.Errorf("%v became %v, %v", k.Key, key, err)
				}
			}
		}
		var anyR Revocations
		if strict.Parse(data, &anyR) == nil && anyR.check(m) == nil {
			for i := range m.Devices() {
				anyR.Revokes(i)
			}
		}
		var anyP RevocationPart
		if strict.Parse(data, &anyP) == nil && anyP.check(m, 0) == nil {
			anyP.bitmap(m)
			for _, e := range anyP.Revoked {
				if (e.Key == nil) != (len(e.Package) == 0) || e.Key != nil && len(e.Package) != sha256.Size {
					t.Errorf("%+v was accepted", e)
				}
			}
		}
	})
}
