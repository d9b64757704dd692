package report_test

import (
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }
