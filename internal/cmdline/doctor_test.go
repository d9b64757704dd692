package cmdline

import (
	"slices"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/hsmkeys"
)

// A token with something less than it might have is fit, and the verdict says what that is; one without something that
// is required is not.
func TestVerdict(t *testing.T) {
	ok := hsmkeys.Finding{Check: "refuses to X", OK: true, Required: true}
	instead := hsmkeys.Finding{Check: "CKM_RSA_X9_31_KEY_PAIR_GEN", Consequence: "another one does it"}
	restored := hsmkeys.Finding{Check: "key K", Consequence: "it was not made in this token"}
	missing := hsmkeys.Finding{Check: "CKM_ECDSA", Required: true, Consequence: "not possible with this token"}
	accepted := hsmkeys.Identity{Weak: []string{"it does not refuse Y"}}
	for name, c := range map[string]struct {
		id     hsmkeys.Identity
		report []hsmkeys.Finding
		want   string
		says   []string
	}{
		"all":         {report: []hsmkeys.Finding{ok}, want: "fit"},
		"another way": {report: []hsmkeys.Finding{ok, instead}, want: "fit"},
		"a restored key": {report: []hsmkeys.Finding{ok, restored}, want: "fit_with_weaknesses",
			says: []string{"key K"}},
		"accepted":       {id: accepted, want: "fit_with_weaknesses", says: []string{"it does not refuse Y"}},
		"one is missing": {report: []hsmkeys.Finding{ok, missing}, want: "not_fit", says: []string{"CKM_ECDSA: not"}},
		"and it is so too": {id: accepted, report: []hsmkeys.Finding{missing}, want: "not_fit",
			says: []string{"Y", "ECDSA"}},
	} {
		v := judge(c.id, c.report)
		var text strings.Builder
		v.print(&text)
		if v.Verdict != c.want || slices.ContainsFunc(c.says, func(s string) bool {
			return !strings.Contains(text.String(), s)
		}) {
			t.Errorf("%s: %+v: %s", name, v, &text)
		}
	}
}
