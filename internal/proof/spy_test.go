package proof

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// No attribute that holds a private or secret key is ever fetched. The doctor asks how long they are, with no
// room for a value, to see it refused. The flows run with OpenSC's spy between the programs and the token,
// which writes down every call.
func TestSpy(t *testing.T) {
	t.Parallel()
	spies, _ := filepath.Glob("/usr/lib/*/pkcs11-spy.so")
	if len(spies) == 0 {
		t.Fatal("there is no pkcs11-spy.so: install opensc-pkcs11")
	}
	log := filepath.Join(t.TempDir(), "spy.log")
	module := regexp.MustCompile(`module-path=[^&]*`)
	w := newWorld(t, func(uri string) string {
		return module.ReplaceAllString(uri, "module-path="+spies[0])
	}, "PKCS11SPY_OUTPUT="+log)
	w.env = append(w.env, "PKCS11SPY="+w.factory.Module)
	w.setUp(bothSuites...)
	w.serve(func(*http.Client) {
		for _, kind := range []string{"", "signature", "payload", "replay"} {
			args := []string{"attach", "--injection", "injection", "--fixture-key", "fixture.key",
				"--fixture-enrolment", "fixture.json", "--server", "unix:" + w.path("s")}
			if kind != "" {
				args = append(args, "--tamper", kind)
			}
			w.run(w.operator, "mesim", args...)
		}
		officer := "file:" + w.operator.SOPINFile
		w.run(w.operator, "keysvc", "storage", "rotate", "--so-pin-source", officer)
		w.run(w.operator, "keysvc", "storage", "retire", "--yes")
		to := field(t, w.run(w.operator, "keysvc", "backup", "prepare", "--out", "restore-key.json", "--json"),
			"thumbprint")
		made := field(t, w.run(w.operator, "keysvc", "backup", "create", "--to", "restore-key.json", "--thumbprint", to,
			"--so-pin-source", officer, "--out", "backup.json", "--json"), "thumbprint")
		w.run(w.operator, "keysvc", "backup", "restore", "backup.json", "--thumbprint", made)
		w.run(w.operator, "mesim", "attach", "--injection", "injection", "--fixture-key", "fixture.key",
			"--fixture-enrolment", "fixture.json", "--server", "unix:"+w.path("s"), "--first-imsi", "001012222222222")
	})

	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	spied := readSpy(string(data))
	for _, what := range spied.fetched {
		t.Errorf("fetched, or to be had: %s", what)
	}
	// That the log was read rightly: what must be there is.
	for _, name := range []string{"CKA_MODULUS", "CKA_EC_POINT", "CKA_VALUE", "CKA_PRIME_1", "CKA_COEFFICIENT"} {
		if spied.asked[name] == 0 {
			t.Errorf("%s was never asked for, so that this test sees nothing", name)
		}
	}
	for _, name := range []string{"C_GenerateKeyPair", "C_GenerateKey", "C_WrapKey", "C_UnwrapKey", "C_Decrypt",
		"C_Verify", "C_Sign", "C_Encrypt", "C_SetAttributeValue"} {
		if spied.calls[name] == 0 {
			t.Errorf("%s was never called, so that this test sees nothing", name)
		}
	}
	t.Logf("asked for: %v", spied.asked)
}

func readSpy(log string) spyLog {
	heading := regexp.MustCompile(`^\d+: (C_\w+)$`)
	attribute := regexp.MustCompile(`^\s+(CKA_\w+)\s*(\S*)(?: / (-?\d+))?`)
	secret := regexp.MustCompile(`^CKA_(VALUE|PRIVATE_EXPONENT|PRIME_[12]|EXPONENT_[12]|COEFFICIENT)$`)
	spied := spyLog{calls: map[string]int{}, asked: map[string]int{}}
	call := ""
	for line := range strings.SplitSeq(log, "\n") {
		if m := heading.FindStringSubmatch(line); m != nil {
			call = m[1]
			spied.calls[call]++
		} else if m := attribute.FindStringSubmatch(line); m != nil && call == "C_GetAttributeValue" {
			name, at, size := m[1], m[2], m[3]
			spied.asked[name]++
			if noRoom := strings.Trim(at, "0") == "" && (size == "0" || size == "-1"); secret.MatchString(name) &&
				!noRoom {
				spied.fetched = append(spied.fetched, strings.TrimSpace(line))
			}
		}
	}
	return spied
}

// Nothing is overlooked in a spy's log.
func TestReadSpy(t *testing.T) {
	const asked = "3: C_GetAttributeValue\n[in] hObject = 0x14\n[in] pTemplate[1]: \n    %s\n[out] pTemplate[1]: \n" +
		"    %s\n"
	for _, c := range []struct {
		in, out string
		fetched int
	}{
		{"CKA_PRIME_1           0000000000000000 / 0", "CKA_PRIME_1           0000000000000000 / -1", 0},
		{"CKA_PRIME_1           0000000000000000 / 0", "CKA_PRIME_1           0000000000000000 / 128", 1},
		{"CKA_PRIME_1           00007f9adc001e30 / 128", "CKA_PRIME_1           0000000000000000 / -1", 1},
		{"CKA_VALUE             00007f9adc001e30 / 32", "CKA_VALUE             00007f9adc001e30 / 32", 2},
		{"CKA_MODULUS           00007f9adc001e30 / 32", "CKA_MODULUS           00007f9adc001e30 / 32", 0},
	} {
		if spied := readSpy(fmt.Sprintf(asked, c.in, c.out)); len(spied.fetched) != c.fetched {
			t.Errorf("%s\n%s\nfetched %q", c.in, c.out, spied.fetched)
		}
	}
}
