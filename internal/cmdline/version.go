package cmdline

import (
	"fmt"
	"runtime/debug"
)

// Version names what this program was built from: its tag (or, between two tags, Go's pseudo-version), commit and Go.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return describe(info)
}

func describe(info *debug.BuildInfo) string {
	commit, changed := "unknown", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			changed = " with changes"
		}
	}
	return fmt.Sprintf("%s, commit %s%s, %s", info.Main.Version, commit, changed, info.GoVersion)
}
