package version

import (
	"fmt"
	"runtime/debug"
	"testing"
)

func TestParts(t *testing.T) {
	for want, settings := range map[string][]debug.BuildSetting{
		"v1.2.3, commit unknown, go1.26.0": nil,
		"v1.2.3, commit abc, go1.26.0": {{Key: "vcs.revision", Value: "abc"},
			{Key: "vcs.modified", Value: "false"}},
		"v1.2.3, commit abc with changes, go1.26.0": {{Key: "vcs.modified", Value: "true"},
			{Key: "vcs.revision", Value: "abc"}},
	} {
		info := &debug.BuildInfo{GoVersion: "go1.26.0", Main: debug.Module{Version: "v1.2.3"}, Settings: settings}
		version, commit, goVersion := parts(info)
		if got := fmt.Sprintf("%s, commit %s, %s", version, commit, goVersion); got != want {
			t.Errorf("%v: %q, want %q", settings, got, want)
		}
	}
}
