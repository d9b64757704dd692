package kme

import (
	"encoding/json"
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
