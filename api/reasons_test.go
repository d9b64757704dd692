package api

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/kme"
)

// docs/protocol.md has each reason with the code that a caller gets.
func TestReasonsOnPage(t *testing.T) {
	page, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	told := map[kme.Reason]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \\| (\\w+) \\|").FindAllStringSubmatch(
		string(page), -1) {
		for reason := range strings.SplitSeq(row[1], ", ") {
			told[kme.Reason(strings.Trim(reason, "`"))] = row[2]
		}
	}
	for reason, code := range codes {
		if told[reason] != code.String() {
			t.Errorf("%s is %s, and the page has %q", reason, code, told[reason])
		}
		delete(told, reason)
	}
	if len(told) > 0 {
		t.Errorf("there are no reasons %v", told)
	}
}
