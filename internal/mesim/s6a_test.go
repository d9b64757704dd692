package mesim

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/kme"
)

// An hss is an HSS and its MME, as the test MME of plugins/freediameter speaks for both, in front of an operator.
type hss struct {
	*operator
	lie  string // as the operator's: "xres", "bearer", "sqn" or "gone"
	sims map[kme.IMSI]*milenage.SIM

	sqnMu sync.Mutex
	sqn   uint64 // guarded by sqnMu
}

// subscribers writes a file of n SIMs from the run's first IMSI on.
func (l *line) subscribers(t *testing.T, n int) (path string) {
	t.Helper()
	var text strings.Builder
	text.WriteString("# IMSI K OPc\n\n")
	for i := range n {
		text.WriteString(fmt.Sprintf("00101000000%04d %032x %032x more\n", i, i+1, i+2))
	}
	l.write(t, "subscribers", []byte(text.String()))
	return filepath.Join(l.dir, "subscribers")
}

// network serves the MME's lines.
func (h *hss) network(t *testing.T) Network {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener := must[net.Listener](t)(net.Listen("unix", path))
	t.Cleanup(func() { listener.Close() })
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			f := strings.Fields(lines.Text())
			answer := h.answer(f[0], f[2:])
			if answer == "" { // the MME has gone
				return
			}
			fmt.Fprintf(conn, "%sA %s %s\n", f[0][:2], f[1], answer)
		}
	}()
	h.sims = must[map[kme.IMSI]*milenage.SIM](t)(ReadSIMs(h.subscribers(t, len(h.devices))))
	return Network{MME: must[*MME](t)(DialMME(path)), SIMs: h.sims}
}

func (h *hss) answer(command string, args []string) string {
	if h.lie == "gone" {
		return ""
	}
	imsi, err := kme.ParseIMSI(args[0])
	if err != nil {
		return err.Error()
	}
	if command == "ULR" {
		return h.update(args)
	}
	sim, random := h.sims[imsi], newRAND()
	h.sqnMu.Lock()
	defer h.sqnMu.Unlock()
	h.sqn++
	if info, _ := hex.DecodeString(args[2]); len(info) > 0 && h.lie != "sqn" {
		h.mu.Lock()
		key := h.bound[args[0]]
		h.mu.Unlock()
		block, err := aes.NewCipher(key.Bytes())
		if err != nil {
			return err.Error()
		}
		sent := [16]byte(info)
		block.Decrypt(sent[:], sent[:])
		sqn, err := sim.Resynchronised(sent, info[16:])
		if err != nil {
			return err.Error()
		}
		h.sqn = sqn + 1
	}
	autn, xres, _, _ := sim.Challenge(random, h.sqn, [2]byte{0x80})
	if h.lie == "xres" {
		xres[0] ^= 1
	}
	out, attempt := h.vector(args[0], bytes.Clone(random[:]))
	control := provisioningOnly
	if attempt == "" {
		control, attempt = preprocessed, "-"
	}
	return fmt.Sprintf("%s %s %s %x:%x:%x:00", success, control, attempt, out, xres, autn)
}

func (h *hss) update(args []string) string {
	if args[2] == "-" {
		return success + " - - subscription"
	}
	payload, err := hex.DecodeString(args[2])
	if err != nil {
		return err.Error()
	}
	nwSig, ok := h.establish(args[0], args[1], payload)
	if !ok {
		return "5003 2 - -"
	}
	subscription := "-"
	if h.lie == "bearer" {
		subscription = "subscription"
	}
	return fmt.Sprintf("%s 0 %x %s", success, nwSig, subscription)
}

func TestAttachS6a(t *testing.T) {
	h := &hss{operator: newOperator(newLine(t, 8), "")}
	run := h.run(t, h.network(t))
	run.Concurrency = 4
	if result, err := run.Attach(t.Context(), ""); err != nil || result.Attached != 8 {
		t.Errorf("%+v, %v", result, err)
	}
	if h.sqn < 1<<20 {
		t.Error("no SIM asked for resynchronisation")
	}
	if _, err := run.Attach(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "bound already") {
		t.Errorf("the same subscriptions again: %v", err)
	}
	run.First = 8
	if _, err := run.Attach(t.Context(), ""); err == nil ||
		!strings.Contains(err.Error(), "there is no IMSI") {
		t.Errorf("without a SIM: %v", err)
	}
}

func TestTamperS6a(t *testing.T) {
	h := &hss{operator: newOperator(newLine(t, 2), "")}
	result, err := h.run(t, h.network(t)).Attach(t.Context(), "payload")
	if err != nil || result.Rejected["5003/2"] != 2 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestLiesS6a(t *testing.T) {
	for lie, want := range map[string]string{
		"nw_sig": "NW_SIG is not", "clear": "with a RAND that is not encrypted",
		"rand": "with the RAND decrypted under KME", "control": "Binding-Control is 1", "xres": "RES is not XRES",
		"bearer": "it allows a bearer", "sqn": "after resynchronisation to SQN", "gone": "the MME has gone",
	} {
		h := &hss{operator: newOperator(newLine(t, 1), lie), lie: lie}
		if result, err := h.run(t, h.network(t)).Attach(t.Context(), ""); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", lie, result, err)
		}
	}
}

func TestReadSIMsRefused(t *testing.T) {
	l := newLine(t, 1)
	for name, text := range map[string]string{
		"two fields": "001010000000000 00\n", "no IMSI": "x 00 00\n", "no hex": "001010000000000 xx 00\n",
		"short": "001010000000000 00 00\n",
	} {
		l.write(t, "subscribers", []byte(text))
		if all, err := ReadSIMs(filepath.Join(l.dir, "subscribers")); err == nil ||
			!strings.Contains(err.Error(), "subscribers: ") {
			t.Errorf("%s: %v, %v", name, all, err)
		}
	}
}
