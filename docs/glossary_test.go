package docs

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Abbreviations that every engineer knows, names of products, roles and files, values, and attributes of PKCS #11.
const ordinary = `ACCEPTED AES AES-256 AES-ECB AMD API AUTHENTICATION AWS BLACKLISTED CERTIFICATE CHANGELOG CONTRIBUTING
	COPYABLE CPU CTRL DEBUG DECRYPT DELETE DNS EPYC ERROR ESTABLISHED EUTRAN EXTRACTABLE FS GB GOGC GOMAXPROCS
	GREYLISTED HMAC-SHA256 HTTP HTTPS ID INFO IP IS JSON KEY KVM L1 L2 L3 LOCAL MB MODIFIABLE NW OAEP OS PATCH PGHOST
	PGPASSFILE PGSERVICE PGSSLMODE POST PREPROCESSED PRIVATE PUBLIC PUT R2 README REFUSED REJECT REQUEST ROLE RPC
	RSA-2048 RSA-3072 RSA-PKCS RSASSA-PKCS1 SAM SDK SECURITY SENSITIVE SET SHA-1 SIGHUP SIGSTOP SIGTERM SQL TCP TLS
	TRANSPORT TS UNAVAILABLE URI URL UTC UTRAN-GERAN WARN WHITELISTED X9 YAML`

// The glossary has every abbreviation of the pages, but for those that are ordinary.
func TestGlossaryIsComplete(t *testing.T) {
	abbreviation := regexp.MustCompile(`\b[A-Z][A-Z0-9]+(?:-[A-Z0-9]+)?\b`)
	code := regexp.MustCompile("(?m)`[^`]*`|^    .*$|\\b\\w*_\\w*\\b")
	known := append(abbreviation.FindAllString(read(t, "glossary.md"), -1), strings.Fields(ordinary)...)
	pages := []string{filepath.Join("..", "README.md")}
	for _, pattern := range []string{"*.md", "hsm/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	if len(pages) < 20 {
		t.Fatalf("only %d pages", len(pages))
	}
	missing := map[string]bool{}
	for _, page := range pages {
		for _, word := range abbreviation.FindAllString(code.ReplaceAllString(read(t, page), " "), -1) {
			if !slices.Contains(known, word) && !missing[word] {
				missing[word] = true
				t.Errorf("%s: the glossary has no %s", page, word)
			}
		}
	}
}
