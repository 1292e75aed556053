// Command plugproxy stands between charon's plugin and qipsecd on their socket
// and spoils single steps of it: a frame that is late, lost or repeated, or a
// connection that is cut in its place. It serves the scenario testenv/late.sh.
//
// The rule is one line in a file, STEP NTH ACTION, read when a frame passes and
// removed when it has been applied:
//
//	STEP    GETKEY, SENT, BIND, ADD, QUERY, UPDATE; with .answer the answer
//	        to it; ADD.ACK and ADD.COMMITTED for the last two frames of an ADD
//	NTH     which such frame after the rule was written: 1 is the next
//	ACTION  cut: both sides see the end in place of the frame
//	        lose: the frame is dropped, the connection stays
//	        late DURATION: it passes that much later, if somebody is still there
//	        twice: it passes two times
//
// It prints "hit RULE" for each.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	listen := flag.String("listen", "", "socket that the plugin is told")
	to := flag.String("to", "", "socket of qipsecd")
	rule := flag.String("rule", "", "file with the rule")
	flag.Parse()
	log.SetFlags(log.Lmicroseconds)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	p := &proxy{to: *to, file: *rule}
	if err := p.serve(ctx, *listen); err != nil {
		log.Fatal(err)
	}
}

type proxy struct {
	to   string
	file string

	mu    sync.Mutex
	rule  string // the one that is counted
	count int    // its frames seen
}

func (p *proxy) serve(ctx context.Context, path string) error {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go p.pass(ctx, c)
	}
}

// pass serves one connection until either end closes it.
func (p *proxy) pass(ctx context.Context, plugin *net.UnixConn) {
	defer func() { _ = plugin.Close() }()
	daemon, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.to, Net: "unixpacket"})
	if err != nil {
		return // as the plugin would see it
	}
	defer func() { _ = daemon.Close() }()
	end := func() { _ = plugin.Close(); _ = daemon.Close() }
	stop := context.AfterFunc(ctx, end)
	defer stop()
	var call call
	var both sync.WaitGroup
	both.Go(func() { p.copy(daemon, plugin, &call, end) })
	both.Go(func() { p.copy(plugin, daemon, &call, end) })
	both.Wait()
}

// call names the frames of one connection in their order.
type call struct {
	mu   sync.Mutex
	name string
}

// Frame types of docs/plugin-protocol.md, at byte 6 of the header.
var names = map[byte]string{
	1: "HELLO", 2: "GETKEY", 3: "SENT", 4: "BIND", 5: "ADD", 6: "QUERY", 7: "UPDATE", 8: "END", 9: "IGNORED",
	16: ".ACK", 130: ".COMMITTED",
}

func (c *call) step(frame []byte) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(frame) < 8 {
		return "?"
	}
	name, ok := names[frame[6]]
	switch {
	case !ok:
		return c.name + ".answer"
	case strings.HasPrefix(name, "."):
		return c.name + name
	}
	c.name = name
	return name
}

// copy passes frames on; at the end of either side it ends the connection.
func (p *proxy) copy(to, from *net.UnixConn, c *call, end func()) {
	defer end()
	buf := make([]byte, 16384)
	for {
		n, err := from.Read(buf)
		if err != nil || n == 0 {
			return
		}
		times := 1
		switch action, d := p.action(c.step(buf[:n])); action {
		case "cut":
			return
		case "lose":
			times = 0
		case "late":
			time.Sleep(d)
		case "twice":
			times = 2
		}
		for range times {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

// action gives what the rule says of a frame, and uses the rule up.
func (p *proxy) action(step string) (string, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := os.ReadFile(p.file)
	if err != nil {
		return "", 0
	}
	rule := strings.TrimSpace(string(b))
	if rule != p.rule {
		p.rule, p.count = rule, 0
	}
	f := strings.Fields(rule)
	if len(f) < 3 || f[0] != step {
		return "", 0
	}
	nth, err := strconv.Atoi(f[1])
	if p.count++; err != nil || p.count != nth {
		return "", 0
	}
	var d time.Duration
	if len(f) > 3 {
		if d, err = time.ParseDuration(f[3]); err != nil {
			return "", 0
		}
	}
	p.rule = ""
	if err := os.Remove(p.file); err != nil {
		return "", 0
	}
	fmt.Printf("hit %s\n", rule)
	return f[2], d
}
