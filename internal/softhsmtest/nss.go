package softhsmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// operatorEnv says whose token an operator has in the tests: nss, or SoftHSM's without it.
const operatorEnv = "KMEHSM_TEST_OPERATOR"

// Operator is a token for an operator's side, which is to work on each of those that we have.
func Operator(t testing.TB) Tok {
	t.Helper()
	if os.Getenv(operatorEnv) == "nss" {
		return NSS(t)
	}
	return Token(t)
}

// NSSRounds is in the environment of a process that uses [NSS]'s tokens: 1 is enough for a test.
const NSSRounds = "NSS_MAX_MP_PBE_ITERATION_COUNT"

// NSS makes a token of NSS softoken that nobody else uses, with a user PIN; NSS has no security officer once there is
// one. It is gone with the test.
//
// A process has one token of NSS, that of its one C_Initialize. So each of ours has a library of its own, which is
// another module to the process.
func NSS(t testing.TB) Tok {
	t.Helper()
	dir := t.TempDir()
	tok := Tok{Label: "nss", PIN: "nss-pin-12", PINFile: filepath.Join(dir, "pin"),
		Module: filepath.Join(dir, "libsoftokn3.so")}
	must.Do(t, os.WriteFile(tok.PINFile, []byte(tok.PIN), 0o600))
	// With the usual 10,000 rounds for each value that it reads from its file, an establishment takes 60 times as long.
	must.Do(t, os.Setenv(NSSRounds, "1"))
	if out, err := exec.Command("certutil", "-N", "-d", "sql:"+dir, "-f", tok.PINFile).CombinedOutput(); err != nil {
		t.Fatalf("certutil: %v: %s: scripts/deps.sh check installs it", err, out)
	}
	library, err := os.ReadFile(nssLibrary())
	if err != nil {
		t.Fatalf("libsoftokn3.so: %v: scripts/deps.sh check installs it", err)
	}
	must.Do(t, os.WriteFile(tok.Module, library, 0o600))
	tok.URI = fmt.Sprintf(
		"pkcs11:token=%s?module-path=%s&x-init-reserved=configdir=sql:%s%%20dbTokenDescription=%s&pin-source=file:%s",
		tok.Label, tok.Module, dir, tok.Label, tok.PINFile)
	return tok
}

// OperatorModule is the library of an operator's tokens, for whoever loads one for all of them.
func OperatorModule() string {
	if os.Getenv(operatorEnv) == "nss" {
		return nssLibrary()
	}
	return ModulePath()
}

// nssLibrary is where the C compiler of this machine would find it.
func nssLibrary() string {
	out, _ := exec.Command("gcc", "-print-file-name=libsoftokn3.so").Output()
	return strings.TrimSpace(string(out))
}
