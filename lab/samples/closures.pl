#!/usr/bin/perl
# Computes through closures, hashes and regular expressions.
use strict;
use warnings;
use Time::HiRes qw(sleep);

my ($lines, $pace) = @ARGV;
# Made by whoever does not want to wait for the end.
my $hurry = "/srv/work/hurry.$$";
$| = 1;

sub counter {
    my ($state) = @_;
    return sub { return $state = ($state * 1103515245 + 12345) % 2147483648 };
}

my @counters = map { counter($_) } 1 .. 50;
my (%seen, $text);
for my $number (0 .. $lines - 1) {
    my $total = 0;
    for my $round (0 .. 100) {
        my $value = $counters[$round % 50]->();
        $seen{$value % 997} .= chr(97 + $value % 26);
        $total = ($total * 31 + $value) % 1000000007;
    }
    ($text = join '', map { $seen{$_} } sort { $a <=> $b } keys %seen) =~ s/([aeiou])\1/<$1>/g;
    print "$number $total ", length($text), "\n";
    sleep($pace) if $pace > 0 && !-e $hurry;
}
print "PASS checksum ", unpack('%32C*', $text), "\n";
