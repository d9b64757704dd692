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

// Build is what Version says, in parts: the version, the commit with what is said of changes, and Go's.
func Build() (version, commit, goVersion string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown", "unknown", "unknown"
	}
	return parts(info)
}

func describe(info *debug.BuildInfo) string {
	version, commit, goVersion := parts(info)
	return fmt.Sprintf("%s, commit %s, %s", version, commit, goVersion)
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
