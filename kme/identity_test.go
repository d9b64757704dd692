package kme

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestParseIMEI(t *testing.T) {
	for in, want := range map[string]string{
		"35209900176148":    "35209900176148",
		"352099001761481":   "35209900176148", // the Luhn digit of the GSMA's and 3GPP's example
		"490154203237518":   "49015420323751",
		"000000000000000":   "00000000000000",
		"3520990017614823":  "35209900176148", // IMEISV
		"352099001761482":   "",
		"490154203237517":   "",
		"":                  "",
		"3520990017614":     "",
		"35209900176148231": "",
		"3520990017614x":    "",
		"-5209900176148":    "",
		"+52099001761481":   "",
		" 35209900176148":   "",
		"٣٥٢٠٩٩٠٠١٧٦١٤٨":    "", // digits, but not ours
	} {
		got, err := ParseIMEI(in)
		if got.String() != want || (err == nil) != (want != "") {
			t.Errorf("ParseIMEI(%q) = %v, %v; want %q", in, got, err, want)
		}
	}
}

func TestIMEIParts(t *testing.T) {
	imei, err := ParseIMEI("35209900176148")
	if err != nil {
		t.Fatal(err)
	}
	if imei.TAC().String() != "35209900" || imei.SNR() != 176148 {
		t.Error(imei.TAC(), imei.SNR())
	}
	for _, c := range []struct {
		snr  int
		want string
	}{{0, "35209900000000"}, {999_999, "35209900999999"}, {-1, ""}, {1_000_000, ""}} {
		got, err := NewIMEI(imei.TAC(), c.snr)
		if got.String() != c.want || (err == nil) != (c.want != "") {
			t.Errorf("NewIMEI(%d) = %v, %v", c.snr, got, err)
		}
	}
	if _, err := NewIMEI(TAC{}, 0); err == nil {
		t.Error("an IMEI without a TAC")
	}
	if zero := (IMEI{}); zero.SNR() != -1 || zero.TAC() != (TAC{}) {
		t.Error("the zero IMEI has parts")
	}
}

// In files an identity has one spelling.
func TestIdentityText(t *testing.T) {
	var v struct {
		IMEI IMEI
		TAC  TAC
		IMSI IMSI
	}
	const good = `{"IMEI":"35209900176148","TAC":"35209900","IMSI":"001010123456789"}`
	if err := json.Unmarshal([]byte(good), &v); err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(v); err != nil || string(b) != good {
		t.Errorf("%s, %v", b, err)
	}
	for _, bad := range []string{`{"IMEI":"352099001761481"}`, `{"IMEI":"3520990017614823"}`, `{"IMEI":35209900176148}`,
		`{"TAC":"3520990"}`, `{"TAC":"3520990x"}`, `{"IMSI":"12345"}`} {
		before := v
		if err := json.Unmarshal([]byte(bad), &v); err == nil || v != before {
			t.Errorf("%s: %v, %v", bad, err, v)
		}
	}
}

func TestParseIMSI(t *testing.T) {
	for in, ok := range map[string]bool{
		"001010": true, "001010123456789": true, "00101": false, "0010101234567890": false, "": false,
		"00101x123": false, "-01011": false,
	} {
		if got, err := ParseIMSI(in); (err == nil) != ok || ok && got.String() != in {
			t.Errorf("ParseIMSI(%q) = %v, %v", in, got, err)
		}
	}
}

// The examples of TS 29.571's pattern of a PEI, and others.
func TestParsePEI(t *testing.T) {
	for in, want := range map[string]string{
		"imei-352099001761481":      "35209900176148",
		"imei-352099001761480":      "35209900176148", // a spare digit, 0, in the place of the check digit
		"imei-000000000000000":      "00000000000000",
		"imeisv-3520990017614800":   "35209900176148",
		"imeisv-3520990017614823":   "35209900176148",
		"imei-352099001761482":      "", // neither
		"imei-35209900176148":       "", // the pattern has 15 digits
		"imei-3520990017614823":     "",
		"imeisv-352099001761481":    "",
		"imeisv-35209900176148231":  "",
		"imeisv-35209900176148 3":   "",
		"imei-35209900176148x":      "",
		"imei-3520990017614x0":      "",
		"IMEI-352099001761481":      "",
		"352099001761481":           "",
		"imei":                      "",
		"imei-":                     "",
		"":                          "",
		"imsi-352099001761481":      "",
		"mac-00-00-5E-00-53":        "",
		"mac-00-00-5E-00-53-00-x":   "",
		"eui-00-00-5E-10-00-00-00-": "",
	} {
		got, err := ParsePEI(in)
		if got.String() != want || (err == nil) != (want != "") || errors.Is(err, ErrOtherIdentity) {
			t.Errorf("ParsePEI(%q) = %v, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"mac-00-00-5E-00-53-00", "mac-5E-10-00-00-00-00-untrusted",
		"eui-AC-DE-48-23-45-67-01-9F"} {
		if got, err := ParsePEI(in); got != (IMEI{}) || !errors.Is(err, ErrOtherIdentity) {
			t.Errorf("ParsePEI(%q) = %v, %v", in, got, err)
		}
	}
}

func TestParseSUPI(t *testing.T) {
	for in, want := range map[string]string{
		"imsi-001010123456789": "001010123456789", "imsi-001010": "001010", "imsi-00101": "",
		"imsi-0010101234567890": "", "imsi-": "", "imsi": "", "": "", "001010123456789": "", "IMSI-001010123456789": "",
		"imsi-00101012345678x": "", "imsi--001010123456": "", "nai-": "", "suci-0-001-01-0000-0-0-0123456789": "",
	} {
		got, err := ParseSUPI(in)
		if got.String() != want || (err == nil) != (want != "") || errors.Is(err, ErrOtherIdentity) {
			t.Errorf("ParseSUPI(%q) = %v, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"nai-user@example.org", "gci-x", "gli-x"} {
		if got, err := ParseSUPI(in); got != (IMSI{}) || !errors.Is(err, ErrOtherIdentity) {
			t.Errorf("ParseSUPI(%q) = %v, %v", in, got, err)
		}
	}
}

// What is accepted has the digits of the name, and is what the other parsers make of them.
func FuzzParsePEI(f *testing.F) {
	for _, s := range []string{"imei-352099001761481", "imei-352099001761480", "imeisv-3520990017614823",
		"mac-00-00-5E-00-53-00", "eui-AC-DE-48-23-45-67-01-9F"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		imei, err := ParsePEI(s)
		if err != nil {
			if imei != (IMEI{}) {
				t.Error("an IMEI with an error")
			}
			return
		}
		_, digits, _ := strings.Cut(s, "-")
		if want, err := ParseIMEI(digits[:IMEIDigits]); err != nil || imei != want {
			t.Errorf("%q became %v, %v", s, imei, err)
		}
	})
}

func FuzzParseSUPI(f *testing.F) {
	f.Add("imsi-001010123456789")
	f.Add("nai-user@example.org")
	f.Fuzz(func(t *testing.T, s string) {
		imsi, err := ParseSUPI(s)
		if err == nil && "imsi-"+imsi.String() != s || err != nil && imsi != (IMSI{}) {
			t.Errorf("%q became %v, %v", s, imsi, err)
		}
	})
}

func FuzzParseIMEI(f *testing.F) {
	for _, s := range []string{"35209900176148", "352099001761481", "3520990017614823", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		imei, err := ParseIMEI(s)
		if err != nil {
			if imei != (IMEI{}) {
				t.Error("an IMEI with an error")
			}
			return
		}
		if again, err := ParseIMEI(imei.String()); err != nil || again != imei {
			t.Errorf("%v is not canonical: %v", imei, err)
		}
		if made, err := NewIMEI(imei.TAC(), imei.SNR()); err != nil || made != imei {
			t.Errorf("%v is not its parts: %v, %v", imei, made, err)
		}
	})
}

func FuzzParseIMSI(f *testing.F) {
	f.Add("001010123456789")
	f.Fuzz(func(t *testing.T, s string) {
		if imsi, err := ParseIMSI(s); err == nil && (imsi.String() != s || len(s) < 6 || len(s) > 15) {
			t.Errorf("%q became %v", s, imsi)
		}
	})
}
