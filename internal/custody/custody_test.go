package custody

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func split(t *testing.T, token string, threshold, count int) (pin string, shares []*Share) {
	t.Helper()
	p, shares, err := New(token, threshold, count)
	if err != nil {
		t.Fatal(err)
	}
	return string(p), shares
}

// combine gives the PIN of some of the shares, by what their custodians decrypt.
func combine(t *testing.T, shares ...*Share) (string, error) {
	t.Helper()
	q := Quorum{Token: shares[0].Token}
	for _, s := range shares {
		text, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if s, err = Parse(text); err != nil {
			return "", err
		}
		if err := q.Add(s); err != nil {
			return "", err
		}
	}
	p, err := q.PIN()
	return string(p), err
}

func TestEveryQuorumHasThePIN(t *testing.T) {
	pin, shares := split(t, "0123", 3, 5)
	if !regexp.MustCompile(`^[A-Z2-7]{32}$`).MatchString(pin) {
		t.Errorf("the PIN has other characters, or another length")
	}
	for chosen := range 1 << 5 {
		var some []*Share
		for i, s := range shares {
			if chosen>>i&1 == 1 {
				some = append(some, s)
			}
		}
		if len(some) == 0 {
			continue
		}
		slices.Reverse(some) // they come in any order
		got, err := combine(t, some...)
		if len(some) < 3 && (err == nil || !strings.Contains(err.Error(), "it takes 3")) {
			t.Errorf("%d shares: %v", len(some), err)
		}
		if len(some) >= 3 && (err != nil || got != pin) {
			t.Errorf("shares %v: %v, the PIN is right: %v", some, err, got == pin)
		}
	}
	if other, _ := split(t, "0123", 3, 5); other == pin {
		t.Error("two splits have one PIN")
	}
	if got, err := new(Quorum).PIN(); err == nil {
		t.Errorf("a PIN of no shares: %v", got)
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		threshold, count int
		ok               bool
	}{{2, 2, true}, {2, 3, true}, {16, 16, true}, {1, 1, false}, {1, 3, false}, {0, 0, false}, {-1, 5, false},
		{4, 3, false}, {2, 17, false}} {
		_, shares, err := New("0123", c.threshold, c.count)
		if (err == nil) != c.ok || c.ok && len(shares) != c.count {
			t.Errorf("%d of %d: %d shares, %v", c.threshold, c.count, len(shares), err)
		}
	}
	_, shares := split(t, strings.Repeat("F", 16), MaxShares, MaxShares)
	if text, err := shares[MaxShares-1].Marshal(); err != nil || len(text) > 4095 {
		t.Errorf("%d bytes are no line of a terminal (%v)", len(text), err)
	}
}

func TestAddRefuses(t *testing.T) {
	_, a := split(t, "0123", 2, 3)
	_, b := split(t, "0123", 2, 3)
	_, c := split(t, "4567", 2, 3)
	_, d := split(t, "\x1b[2J0123", 2, 3) // witnesses look at the terminal
	for _, e := range []struct {
		name  string
		q     Quorum
		first []*Share
		last  *Share
		want  string
	}{
		{"twice", Quorum{Token: "0123"}, a[:1], a[0], "was given twice"},
		{"of another split", Quorum{Token: "0123"}, a[:1], b[1], "not of the same split"},
		{"of a split that is not the token's", Quorum{Token: "0123", Splits: []hsmkeys.Split{a[0].Split.Split}}, nil,
			b[0], "of another split than the one that the token names"},
		{"of another token", Quorum{Token: "0123"}, nil, c[0], `serial number "4567"`},
		{"that clears the screen", Quorum{Token: "0123"}, nil, d[0], `serial number "\x1b[2J0123"`},
	} {
		for _, s := range e.first {
			if err := e.q.Add(s); err != nil {
				t.Fatal(err)
			}
		}
		if err := e.q.Add(e.last); err == nil || !strings.Contains(err.Error(), e.want) {
			t.Errorf("%s: %v", e.name, err)
		}
		if got := e.q.Indexes(); len(got) != len(e.first) {
			t.Errorf("%s: taken: %v", e.name, got)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	_, shares := split(t, "0123", 3, 5)
	text, err := shares[1].Marshal()
	if err != nil {
		t.Fatal(err)
	}
	_, others := split(t, "0123", 3, 5)
	other, err := others[1].Marshal()
	if err != nil {
		t.Fatal(err)
	}
	change := func(field string, value any) string {
		var m map[string]any
		if err := json.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		m[field] = value
		changed, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(changed)
	}
	field := func(text []byte, name string) any {
		var m map[string]any
		if err := json.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		return m[name]
	}
	for name, c := range map[string]struct{ text, want string }{
		"nothing":              {"", "no share"},
		"text":                 {"hunter2", "no share"},
		"encrypted":            {"age-encryption.org/v1\n-> X25519 x\n", "still encrypted"},
		"encrypted, armored":   {"-----BEGIN AGE ENCRYPTED FILE-----\n", "still encrypted"},
		"cut":                  {string(text[:len(text)/2]), "no share"},
		"two":                  {string(text) + string(text), "no share"},
		"of another type":      {change("typ", "kme-transport-key"), "no share"},
		"an unknown field":     {change("more", 1), "no share"},
		"another token":        {change("token", "4567"), "damaged"},
		"another split":        {change("split", others[0].ID), "damaged"},
		"another index":        {change("index", 3), "damaged"},
		"index 0":              {change("index", 0), "damaged"},
		"index 6 of 5":         {change("index", 6), "damaged"},
		"a huge index":         {change("index", 1e30), "no share"},
		"a threshold of 1":     {change("threshold", 1), "damaged"},
		"a lower threshold":    {change("threshold", 2), "damaged"},
		"more shares":          {change("count", 6), "damaged"},
		"a million shares":     {change("count", 1_000_000), "damaged"},
		"no commitments":       {change("commitments", ""), "damaged"},
		"other commitments":    {change("commitments", field(other, "commitments")), "damaged"},
		"no value":             {change("value", ""), "damaged"},
		"another's value":      {change("value", field(other, "value")), "damaged"},
		"a value out of range": {change("value", strings.Repeat("_", 42)+"8"), "damaged"},
	} {
		if s, err := Parse([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, s, err)
		} else if v := field(text, "value").(string); strings.Contains(err.Error(), v) {
			t.Errorf("%s: the error has the secret: %v", name, err)
		}
	}
	if s, err := Parse([]byte("  \r\n" + string(text) + "\n")); err != nil || s.Index != 2 {
		t.Errorf("with space around: %v, %v", s, err)
	}
}

// A share with commitments that its holder has made for it names another split.
func TestForgedShare(t *testing.T) {
	_, shares := split(t, "0123", 2, 3)
	_, forged := split(t, "0123", 2, 3)
	forged[1].ID = shares[0].ID
	text, err := forged[1].Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if s, err := Parse(text); err == nil {
		t.Errorf("taken: %v", s)
	}
}

func TestPrintsNoSecret(t *testing.T) {
	_, shares := split(t, "0123", 2, 2)
	said := regexp.MustCompile(`share [12] of split [0-9a-f]{20}`)
	for _, v := range []any{shares[0], *shares[0], shares, struct{ S Share }{*shares[0]}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
			text := fmt.Sprintf(verb, v)
			if rest := said.ReplaceAllString(text, ""); rest == text ||
				regexp.MustCompile(`[0-9a-f]{3}`).MatchString(rest) {
				t.Errorf("%s of a %T prints %q", verb, v, text)
			}
		}
	}
	if j, err := json.Marshal(shares[0]); err != nil || bytes.Contains(j, []byte("alue")) {
		t.Errorf("JSON: %s, %v", j, err)
	}
}

func TestCustodians(t *testing.T) {
	a, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	b, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	ra, rb := a.Recipient().String(), b.Recipient().String()
	all, err := ParseCustodians([]string{ra, rb})
	if err != nil || len(all) != 2 || all[0].String() != ra || all[1].String() != rb {
		t.Fatalf("%v, %v", all, err)
	}
	mistyped := ra[:len(ra)-1] + "x"
	if mistyped == ra {
		mistyped = ra[:len(ra)-1] + "z"
	}
	for name, c := range map[string]struct {
		list []string
		want string
	}{
		"twice":             {[]string{ra, rb, ra}, "custodians 1 and 3 are the same"},
		"twice, with space": {[]string{ra, ra + "\n"}, "custodians 1 and 2 are the same"},
		"two in one":        {[]string{ra + "\n" + rb}, "no age recipient"},
		"nothing":           {[]string{""}, "no age recipient"},
		"mistyped":          {[]string{mistyped}, "no age recipient"},
		"a secret key":      {[]string{a.String()}, "secret key"},
		"an SSH key":        {[]string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ"}, "no age recipient"},
	} {
		if _, err := ParseCustodians(c.list); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), a.String()) {
			t.Errorf("%s: the error has the secret key", name)
		}
	}
	_, shares := split(t, "0123", 2, 2)
	for i, identity := range []age.Identity{a, b} {
		file, err := shares[i].Encrypt(all[i])
		if err != nil {
			t.Fatal(err)
		}
		r, err := age.Decrypt(bytes.NewReader(file), identity)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if s, perr := Parse(text); err != nil || perr != nil || s.Index != i+1 || s.ID != shares[0].ID {
			t.Errorf("%v, %v, %v", s, err, perr)
		}
		if bytes.Count(text, []byte("\n")) != 1 {
			t.Errorf("it is not one line")
		}
	}
}

// The custodian's own age, not the library that encrypted it, decrypts a share.
func TestAgeDecryptsIt(t *testing.T) {
	dir := t.TempDir()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	custodians, err := ParseCustodians([]string{identity.Recipient().String()})
	if err != nil {
		t.Fatal(err)
	}
	_, shares := split(t, "0123", 2, 2)
	file, err := shares[1].Encrypt(custodians[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"key": []byte(identity.String() + "\n"), "share.age": file} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text, err := exec.Command("age", "-d", "-i", filepath.Join(dir, "key"), filepath.Join(dir, "share.age")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if s, err := Parse(text); err != nil || s.Index != 2 || s.ID != shares[0].ID {
		t.Errorf("%v, %v", s, err)
	}
}

func FuzzParse(f *testing.F) {
	_, shares, err := New("0123", 2, 3)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range shares {
		text, err := s.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"typ":"kme-so-share","threshold":2,"count":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse(data)
		if err != nil {
			return
		}
		text, err := s.Marshal() // what was taken is a share, and stays one
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(text)
		if err != nil || again.ID != s.ID || again.Index != s.Index {
			t.Errorf("%v became %v, %v", s, again, err)
		}
		if err := (&Quorum{Token: s.Token}).Add(s); err != nil {
			t.Error(err)
		}
	})
}
