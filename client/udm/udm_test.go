package udm

import (
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/kmehsm/kmehsm/client"
)

const network = "5G:mnc001.mcc001.3gppnetwork.org"

func unhex(s string) [16]byte {
	b, _ := hex.DecodeString(s)
	return [16]byte(b)
}

// set1 is TS 35.208 clause 4.3, test set 1.
func set1() Vector {
	xres := unhex("a54211d5e3ba50bf0000000000000000")
	return Vector{RAND: unhex("23553cbe9637a89d218ae64dae47bf35"), AUTN: unhex("55f328b43577b9b94a9ffac354dfafb3"),
		CK: unhex("b40ba9a3c58b2a05bbf0d987b21bf8cb"), IK: unhex("f769bcd751044604127672711c6d3441"), XRES: xres[:8]}
}

// 3GPP has no test data for TS 33.501 Annex A. These answers were made with Python's hmac and hashlib.
func TestFormulas(t *testing.T) {
	v := set1()
	xres, kausf := v.xresStar(network), v.kausf(network)
	hxres := HXRESStar(v.RAND, xres)
	for _, c := range []struct {
		name, want string
		got        []byte
	}{
		{"XRES*", "f236a7417272bfb2d66d4d670733b527", xres[:]},
		{"KAUSF", "474698caf02cc715db2ec0726510cfee6caa5bb1a649cb01224f2e23af94de1b", kausf[:]},
		{"HXRES*", "20a71900b01776bfd773e8c15a825446", hxres[:]},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s is %s, want %s", c.name, got, c.want)
		}
	}
}

func TestOrigin(t *testing.T) {
	for in, want := range map[string]string{
		network:                           "5gc.mnc001.mcc001.3gppnetwork.org",
		network + ":0000ABCDEF1":          "5gc.nid0000abcdef1.mnc001.mcc001.3gppnetwork.org", // an SNPN's
		network + ":0000abcdef1":          "",
		network + ":":                     "",
		network + "\n":                    "",
		"5G:NSWO":                         "",
		"":                                "",
		network[3:]:                       "",
		"x" + network:                     "",
		network + ".org":                  "",
		"5G:mnc01.mcc001.3gppnetwork.org": "",
	} {
		o, err := Origin(in)
		if o.Name.String() != want || (err == nil) != (want != "") {
			t.Errorf("Origin(%q) = %v, %v; want %q", in, o, err, want)
		}
	}
}

func TestJSON(t *testing.T) {
	a := AV{RAND: client.RAND{1}, AUTN: [16]byte{2}, XRESStar: [16]byte{3}, KAUSF: [32]byte{4}, AttemptID: "not there"}
	b, err := json.Marshal(a)
	const want = `{"autn":"02000000000000000000000000000000","avType":"5G_HE_AKA",` +
		`"kausf":"0400000000000000000000000000000000000000000000000000000000000000",` +
		`"rand":"01000000000000000000000000000000","xresStar":"03000000000000000000000000000000"}`
	if string(b) != want || err != nil {
		t.Errorf("%s, %v", b, err)
	}
}

// What is no name of a subscription, a device or a network is refused before keysvc is asked: there is none here.
func TestRefused(t *testing.T) {
	c, err := client.New(client.Options{URLs: []string{"unix:/nowhere/none"}, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	u, ctx := New(c), t.Context()
	good, bad := "imsi-001010123456789", "nai-user@example.org"
	for name, ask := range map[string]func(supi, network, pei string, v Vector) error{
		"GenerateAuthData": func(supi, network, _ string, v Vector) error {
			_, err := u.GenerateAuthData(ctx, supi, network, v)
			return err
		},
		"RestoreRAND": func(supi, network, _ string, v Vector) error {
			_, err := u.RestoreRAND(ctx, supi, network, v.RAND)
			return err
		},
		"ConfirmAuth": func(supi, network, _ string, _ Vector) error {
			_, err := u.ConfirmAuth(ctx, supi, network, true)
			return err
		},
		"Provision": func(supi, network, pei string, _ Vector) error {
			_, err := u.Provision(ctx, supi, network, pei, "a", nil)
			return err
		},
	} {
		asked := ask(good, network, "imei-352099001761481", set1()).Error()
		refused := []error{ask(bad, network, "imei-352099001761481", set1()),
			ask(good, "5G:NSWO", "imei-352099001761481", set1())}
		if name == "Provision" {
			refused = append(refused, ask(good, network, "mac-00-00-5E-00-53-00", set1()))
		}
		if name == "GenerateAuthData" {
			refused = append(refused, ask(good, network, "", Vector{}))
		}
		for _, err := range refused {
			if err == nil || err.Error() == asked {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
