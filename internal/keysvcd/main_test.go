package keysvcd

import (
	"testing"

	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 10) }
