// Package version says what a program was built from.
package version

import (
	"fmt"
	"runtime/debug"
)

// Text names the version of this program: its tag (or, between two tags, Go's pseudo-version), commit and Go.
func Text() string {
	version, commit, goVersion := Parts()
	return fmt.Sprintf("%s, commit %s, %s", version, commit, goVersion)
}

// Parts is Text in its parts. The commit says whether there were changes beside it.
func Parts() (version, commit, goVersion string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown", "unknown", "unknown"
	}
	return parts(info)
}

func parts(info *debug.BuildInfo) (version, commit, goVersion string) {
	commit, changed := "unknown", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			changed = " with changes"
		}
	}
	return info.Main.Version, commit + changed, info.GoVersion
}
